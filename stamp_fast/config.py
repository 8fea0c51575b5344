"""Which implementation of the operators runs, and which did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, get_args

from .errors import ArgumentError

__all__ = ["BACKENDS", "Backend", "backend", "ran", "recording", "use_backend"]

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


def check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ArgumentError(f"backend: must be one of {', '.join(BACKENDS)}, got {name!r}")
