"""What a prune did: every group's verdict, costs before and after, measured on this machine."""

from .build import Measured, by_unit, measured, pruning_report
from .measure import StepCost, compare_forwards, compare_steps, copy_of, layer_times
from .report import GroupVerdict, PruneReport
from .verdicts import verdicts

__all__ = [
    "GroupVerdict",
    "Measured",
    "PruneReport",
    "StepCost",
    "by_unit",
    "compare_forwards",
    "compare_steps",
    "copy_of",
    "layer_times",
    "measured",
    "pruning_report",
    "verdicts",
]
