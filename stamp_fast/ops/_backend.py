"""Which implementation of an operator a call takes."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext

import torch

from .. import config
from .._load import HAS_CUDA_KERNELS
from ..errors import ArgumentError

_HAS_TRITON = importlib.util.find_spec("triton") is not None  # not imported before it is needed
_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(op: str, tensor: torch.Tensor, wanted: str | None, has_triton: bool = False) -> str:
    """The backend for this tensor: never "auto".

    Args:
        has_triton: there is a Triton kernel for this very call.

    Raises:
        ArgumentError: the one that is asked for cannot take the call.
    """
    name = config.backend if wanted is None else wanted
    config.check_backend(name)
    if wanted is None and name == "triton" and not (has_triton and tensor.dtype in _TRITON_DTYPES):
        name = "auto"  # the setting says "where there is one"
    if name == "auto":
        # cuDNN on packed weights comes before Triton until benchmarks/gpu_suite.py has shown on a GPU which is faster.
        order = ("cpu", "cuda", "triton", "reference")
        return next(backend for backend in order if _obstacle(backend, tensor, has_triton) is None)
    obstacle = _obstacle(name, tensor, has_triton)
    if obstacle is not None:
        raise ArgumentError(f"{op}: backend '{name}' {obstacle}; use backend='auto'")
    return name


def _obstacle(backend: str, tensor: torch.Tensor, has_triton: bool) -> str | None:
    """Why this backend cannot take the call; None: it can."""
    device = tensor.device.type
    if backend == "cpu":
        return None if device == "cpu" else f"takes CPU tensors, got one on {device}"
    if backend == "cuda":
        return _no_cuda(device)
    if backend == "triton":
        return _no_triton(device, tensor.dtype) if has_triton else "has no kernel for this call"
    return None


def _no_cuda(device: str) -> str | None:
    if device != "cuda":
        return f"takes CUDA tensors, got one on {device}"
    return None if HAS_CUDA_KERNELS else "needs stamp_fast/_C_cuda, which is not built (STAMP_CUDA=1)"


def _no_triton(device: str, dtype: torch.dtype) -> str | None:
    if not _HAS_TRITON:
        return "needs the package triton"
    if dtype not in _TRITON_DTYPES:
        return f"takes float32, bfloat16 and float16, got {dtype}"
    if device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"takes CUDA tensors, got one on {device} (TRITON_INTERPRET=1 interprets the kernels)"


def note(op: str, backend: str) -> None:
    """Says in `config.ran` which one runs; a compiler that traces the call runs none."""
    if not torch.compiler.is_compiling():
        config.ran[op] = backend


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Triton launches on the current device, whatever its arguments lie on."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
