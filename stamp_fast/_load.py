"""Loads the native libraries, and says how to build one that is missing."""

from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch

_CURE = (
    "Build the native libraries with `python setup.py build_ext` in a checkout, "
    "or install with `pip install --no-build-isolation -e .`"
)


def _library_path(name: str) -> Path | None:
    candidates = (Path(__file__).with_name(name + suffix) for suffix in EXTENSION_SUFFIXES)
    return next((path for path in candidates if path.is_file()), None)


def _load_operators(name: str) -> None:
    path = _library_path(name)
    if path is None:
        raise ImportError(f"stamp_fast: the native library stamp_fast/{name} is missing. {_CURE}.")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"stamp_fast: cannot load {path}: {error}. {_CURE}.") from error


def graph_core() -> ModuleType:
    """The channel graph engine, the C++ module `stamp_fast._graph`."""
    try:
        return import_module("stamp_fast._graph")
    except ImportError as error:
        raise ImportError(f"stamp_fast: cannot load stamp_fast/_graph: {error}. {_CURE}.") from error


_load_operators("_C")

# True where the CUDA operators are loaded; without them CUDA tensors take the way of plain PyTorch operators.
HAS_CUDA_KERNELS: bool = torch.version.cuda is not None and _library_path("_C_cuda") is not None
if HAS_CUDA_KERNELS:
    _load_operators("_C_cuda")
