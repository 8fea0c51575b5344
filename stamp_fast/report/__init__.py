"""What a prune did: every group's verdict, costs before and after, measured on this machine."""

from .measure import StepCost, compare_steps
from .report import GroupVerdict, PruneReport
from .verdicts import verdicts

__all__ = ["GroupVerdict", "PruneReport", "StepCost", "compare_steps", "verdicts"]
