"""The cut itself: every new tensor is built first, then all are put in place, or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.weight_norm import WeightNorm

from ..errors import ArgumentError
from . import _history
from ._optimizers import Optimizers, state_by_parameter
from ._plan import Plan
from ._record import slot_tensors
from ._snapshot import Snapshot, replace_data

if TYPE_CHECKING:
    from .graph import ChannelGraph


def apply(graph: ChannelGraph, plan: Plan, optimizer: Optimizers, ema: nn.Module | None) -> None:
    """Cuts parameters, buffers, gradients, optimizer state and module attributes, in place.

    Parameter objects stay the same, so optimizers, tied modules and hooks keep hold of them.
    """
    slot_of: list[int] = []
    tensors: list[torch.Tensor] = []
    puts: list[Callable[[torch.Tensor], None]] = []

    def cut(slot: int, tensor: torch.Tensor, put: Callable[[torch.Tensor], None]) -> None:
        slot_of.append(slot)
        tensors.append(tensor.detach())
        puts.append(put)

    states = state_by_parameter(graph.model, optimizer)
    average = matching(graph, ema)
    for i, slot in enumerate(graph.slots):
        if not plan.shrinks(i):
            continue
        owner = slot.tensor
        cut(i, owner, partial(_put_data, owner))
        if owner.grad is not None:
            cut(i, owner.grad, partial(setattr, owner, "grad"))
        if average is not None:
            cut(i, average[slot.name], partial(_put_data, average[slot.name]))
        for state, key in states.get(id(owner), ()):
            cut(i, state[key], partial(state.__setitem__, key))
    with torch.no_grad():
        new = _gather(plan, slot_of, tensors)

    twins = _twin_modules(graph, ema)
    snapshot = Snapshot(graph.model, optimizer, ema)
    try:
        for put, tensor in zip(puts, new, strict=True):
            put(tensor)
        _history.record(plan, twins)
        for module, name, value in plan.attributes:
            for target in (module, *twins.get(module, ())):
                setattr(target, name, value)
        for module in graph.model.modules():
            for target in (module, *twins.get(module, ())):
                _recompute_weights(target)
    except BaseException:
        snapshot.restore()
        raise
    graph.recording.caches.clear()  # what was worked out for the old widths


def _gather(plan: Plan, slot_of: list[int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The live part of every tensor, in its memory format."""
    dense = [i for i, tensor in enumerate(tensors) if tensor.layout == torch.strided]
    packed = plan.gather([slot_of[i] for i in dense], [tensors[i] for i in dense])
    new = {i: t.contiguous(memory_format=_format(tensors[i])) for i, t in zip(dense, packed, strict=True)}
    for i in range(len(tensors)):
        if i not in new:  # the gradient of an embedding made with sparse=True
            new[i] = tensors[i]
            for dim, index in enumerate(plan.kept[slot_of[i]]):
                new[i] = new[i] if index is None else new[i].index_select(dim, index.to(new[i].device))
    return [new[i] for i in range(len(tensors))]


def matching(graph: ChannelGraph, ema: nn.Module | None) -> dict[str, torch.Tensor] | None:
    """The average's parameters and buffers by the model's names.

    Raises:
        ArgumentError: not a module, the model itself, a name is missing, or a shape differs.
    """
    if ema is None:
        return None
    inner = _inner(graph, ema)
    if inner is graph.model:
        raise ArgumentError("ema: is the model itself; give a copy of it, or leave it out")
    named = slot_tensors(inner)
    for slot in graph.slots:
        if slot.name not in named:
            raise ArgumentError(f"ema: has no parameter or buffer named '{slot.name}'")
        theirs = named[slot.name].shape
        if theirs != slot.tensor.shape:
            raise ArgumentError(f"ema: '{slot.name}' has shape {tuple(theirs)}, the model's {tuple(slot.tensor.shape)}")
    return named


def _inner(graph: ChannelGraph, ema: Any) -> nn.Module:
    return copy_inside(ema, graph.slots[0].name if graph.slots else "")


def copy_inside(ema: Any, tensor: str) -> nn.Module:
    """The copy of the model in its average, which may be wrapped (`AveragedModel`) or compiled.

    Args:
        tensor: name of one of the model's parameters or buffers.
    """
    if not isinstance(ema, nn.Module):
        raise ArgumentError(f"ema: expected a torch.nn.Module, got {type(ema).__name__}; cut its copy of the model")
    while tensor not in slot_tensors(ema):
        inside = getattr(ema, "_orig_mod", None) or getattr(ema, "module", None)
        if not isinstance(inside, nn.Module):
            break
        ema = inside
    return ema


def _twin_modules(graph: ChannelGraph, ema: nn.Module | None) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For each module of the model the one of the same name in its average, if there is an average."""
    if ema is None:
        return {}
    named = dict(_inner(graph, ema).named_modules())
    return {module: (named[name],) for name, module in graph.model.named_modules() if name in named}


def _recompute_weights(module: nn.Module) -> None:
    """`weight_norm` and the masks of `torch.nn.utils.prune` keep the weight they compute as a plain attribute."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, (WeightNorm, BasePruningMethod)):
            with torch.no_grad():
                hook(module, ())


def _put_data(owner: torch.Tensor, data: torch.Tensor) -> None:
    # A gradient of the old shape may not stay beside data of the new one; its own cut follows.
    owner.grad = None
    replace_data(owner, data)


def _format(tensor: torch.Tensor) -> torch.memory_format:
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous():
        return torch.channels_last
    if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d) and not tensor.is_contiguous():
        return torch.channels_last_3d
    return torch.contiguous_format
