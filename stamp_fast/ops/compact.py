"""Takes positions out of many tensors at once: parameters, gradients, averages, the state of an optimizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import ArgumentError
from ._tensors import memory_format
from .pack_weights import pack_weights


@torch.no_grad()
def compact_(tensors: Sequence[Tensor], kept: Sequence[Sequence[Tensor | None]]) -> None:
    """Shrinks the tensors in place to the positions that stay, their gradients along with them.

    The objects stay the same, so whoever holds them (a module, an optimizer) holds the small ones. All are gathered
    before any is changed. CPU and CUDA; memory formats are kept.

    Args:
        kept: per tensor and dim, (k,) int64 positions that stay, each once; None: all.

    Raises:
        ArgumentError: `kept` does not have an entry for every dim of every tensor.
        RuntimeError: positions are out of range; nothing has been changed.
    """
    if len(kept) != len(tensors) or any(len(k) != t.ndim for k, t in zip(kept, tensors, strict=True)):
        wanted = [t.ndim for t in tensors]
        raise ArgumentError(f"compact_: kept must hold {wanted} entries, one a dim, got {[len(k) for k in kept]}")
    with_grad = [i for i, t in enumerate(tensors) if t.grad is not None]
    dense = [*tensors, *(tensors[i].grad for i in with_grad)]
    small = gather([t.detach() for t in dense], [*kept, *(kept[i] for i in with_grad)])
    small = [s.contiguous(memory_format=memory_format(t)) for s, t in zip(small, dense, strict=True)]
    grads = dict(zip(with_grad, small[len(tensors) :], strict=True))
    for i, tensor in enumerate(tensors):
        tensor.grad = None  # one of the old shape may not stay beside data of the new one
        tensor.data = small[i]
        tensor.grad = grads.get(i)


def gather(
    tensors: Sequence[Tensor],
    kept: Sequence[Sequence[Tensor | None]],
    scales: Sequence[tuple[int, Tensor] | None] | None = None,
) -> list[Tensor]:
    """The live part of every tensor, in one `pack_weights` call; differentiable.

    What that does not take goes through plain tensor operators: a dim beyond the second, a factor along another dim
    than its own, a dtype without a kernel.

    Args:
        kept: per tensor and dim, (k,) int64 positions that stay; None: all.
        scales: per tensor a dim and one factor for each position that stays along it; None: 1.
    """
    tensors = list(tensors)
    rows, cols, factors, late = [], [], [], {}
    for i, tensor in enumerate(tensors):
        index = [None if k is None else k.to(tensor.device) for k in kept[i]]
        native = tensor.is_floating_point() and tensor.dim() > 0
        for dim in range(2 if native else 0, tensor.dim()):
            if index[dim] is not None:
                tensor = tensor.index_select(dim, index[dim])
                index[dim] = None
        tensors[i] = tensor
        factor = None
        if scales is not None and scales[i] is not None:
            dim, factor = scales[i]
            factor = factor.to(tensor.dtype)
            if dim != min(1, tensor.dim() - 1):
                late[i] = factor.view([-1 if d == dim else 1 for d in range(tensor.dim())])
                factor = None
        rows.append(index[0] if index else None)
        cols.append(index[1] if len(index) > 1 else None)
        factors.append(factor)
    native = [i for i, t in enumerate(tensors) if t.is_floating_point() and t.dim() > 0]
    packed = pack_weights(*([values[i] for i in native] for values in (tensors, rows, cols, factors)))
    for i, tensor in zip(native, packed, strict=True):
        tensors[i] = tensor * late[i] if i in late else tensor
    return tensors
