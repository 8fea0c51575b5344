"""Physically smaller networks, chosen for the data at hand, that are cheaper to train."""

from stamp_fast._load import HAS_CUDA_KERNELS

from . import importance
from .budget import Budget
from .errors import (
    ArgumentError,
    BudgetError,
    CompactionError,
    LoaderError,
    ModelError,
    StampFastError,
    TraceError,
)
from .graph import ChannelGraph, Group, trace

# These two share their names with the module and the package that they come from; the functions win.
from .prune import prune, report

__version__ = "0.1.0"

__all__ = [
    "HAS_CUDA_KERNELS",
    "ArgumentError",
    "Budget",
    "BudgetError",
    "ChannelGraph",
    "CompactionError",
    "Group",
    "LoaderError",
    "ModelError",
    "StampFastError",
    "TraceError",
    "__version__",
    "importance",
    "prune",
    "report",
    "trace",
]
