"""Physically smaller networks, chosen for the data at hand, that are cheaper to train."""

from stamp_fast._load import HAS_CUDA_KERNELS

from . import config, early, importance, metapruning, nn
from .budget import Budget
from .checkpoint import load, load_plan, save
from .errors import (
    ArgumentError,
    BudgetError,
    CheckpointError,
    CompactionError,
    LoaderError,
    ModelError,
    StampFastError,
    TraceError,
)
from .graph import ChannelGraph, Group, trace

# Functions that share their names with the module or package that they come from win.
from .prune import prune, report
from .pruning_plan import PruningPlan, apply_plan, plan_of
from .sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "HAS_CUDA_KERNELS",
    "ArgumentError",
    "Budget",
    "BudgetError",
    "ChannelGraph",
    "CheckpointError",
    "CompactionError",
    "Group",
    "LoaderError",
    "ModelError",
    "PruningPlan",
    "StampFastError",
    "TraceError",
    "__version__",
    "apply_plan",
    "config",
    "early",
    "importance",
    "load",
    "load_plan",
    "metapruning",
    "nn",
    "plan_of",
    "prune",
    "report",
    "save",
    "sweep",
    "trace",
]
