"""Which implementation of the operators runs, and which did; where measured costs are kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from .errors import ArgumentError

__all__ = ["BACKENDS", "Backend", "backend", "costs_file", "ran", "recording", "use_backend"]

Backend = Literal["auto", "reference", "cpu", "cuda", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)

backend: Backend = "auto"
"""What operators that are not told otherwise take. "auto": native code for the tensors' device; "reference": plain
PyTorch; "cpu": C++, and oneDNN through ATen; "cuda": CUDA C++, and cuDNN through ATen; "triton": Triton where there is
a kernel, on CPU tensors in its interpreter, for tests (TRITON_INTERPRET=1), else as "auto"."""

ran: dict[str, str] = {}
"""By operator, the implementation that ran last."""


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Inside, operators that are not told otherwise take this implementation.

    Raises:
        ArgumentError: there is none of that name.
    """
    global backend
    check_backend(name)
    before, backend = backend, name
    try:
        yield
    finally:
        backend = before


@contextmanager
def recording() -> Iterator[dict[str, str]]:
    """`ran`, with what runs inside alone; afterwards it holds what it held before, too."""
    before = dict(ran)
    ran.clear()
    try:
        yield ran
    finally:
        inside = dict(ran)
        ran.clear()
        ran.update(before | inside)


def costs_file() -> str | None:
    """Where measured costs are kept from one prune to the next: `costs.jsonl` in the folder that
    STAMP_FAST_CACHE names (default: ~/.cache/stamp_fast). None where that cannot be written to, or is empty text."""
    folder = os.environ.get("STAMP_FAST_CACHE", os.path.join("~", ".cache", "stamp_fast"))
    if not folder:
        return None
    folder = os.path.expanduser(folder)
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError:
        return None
    return os.path.join(folder, "costs.jsonl") if os.access(folder, os.W_OK) else None


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ArgumentError(f"backend: must be one of {', '.join(BACKENDS)}, got {name!r}")
