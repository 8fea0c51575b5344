"""What the Python side of all operators needs to know of a tensor; mirrors csrc/tensors.h and csrc/checks.h."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The format that results keep. Ambiguous strides (1x1 kernels) count as contiguous."""
    if tensor.ndim not in (4, 5):
        return torch.contiguous_format
    size, stride = tensor.shape, tensor.stride()
    dims = range(tensor.ndim - 1, 1, -1)

    def dense(order: Sequence[int]) -> bool:
        expected = 1
        for dim in order:
            if stride[dim] != expected:
                return False
            expected *= size[dim]
        return True

    if not dense([1, *dims]) or dense([*dims, 1]):
        return torch.contiguous_format
    return torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d


def new_empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty tensor of this shape in the memory format of `like`."""
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=memory_format(like))


def check_float(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16),
        lambda: f"{op}: {name} must be float32, float64, bfloat16 or float16, got {tensor.dtype}",
    )


def check_same_dtype(op: str, name: str, tensor: Tensor, first_name: str, first: Tensor) -> None:
    torch._check(
        tensor.dtype == first.dtype,
        lambda: f"{op}: {name} must have the dtype of {first_name}, {first.dtype}, got {tensor.dtype}",
    )


def pair(op: str, name: str, value: int | Sequence[int]) -> list[int]:
    """One number for height and width, or two."""
    found = [value, value] if isinstance(value, int) else list(value)
    if len(found) != 2 or isinstance(value, str):
        raise ArgumentError(f"{op}: {name} must be one number or two, got {value!r}")
    return found


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast would have this tensor's device multiply in; None where it is off, or the device has none."""
    kind = tensor.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def differentiable_once(backward: str) -> None:
    """A backward through this backward operator is an error: without it gradients would be wrong without a word."""

    def refuse(ctx: object, *grads: object) -> None:
        raise RuntimeError(f"{backward}: is not differentiable; backend='reference' can be differentiated twice")

    torch.library.register_autograd(f"stamp_fast::{backward}", refuse)
