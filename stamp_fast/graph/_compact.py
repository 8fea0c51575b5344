"""The cut itself: every new tensor is built first, then all are put in place, or none."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError
from . import _history
from ._plan import Plan
from ._snapshot import Snapshot, replace_data

if TYPE_CHECKING:
    from .graph import ChannelGraph


def apply(graph: ChannelGraph, plan: Plan, optimizer: torch.optim.Optimizer | None, ema: nn.Module | None) -> None:
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

    averages = _averages(graph, ema)
    twins = _twin_modules(graph.model, ema)
    for i, slot in enumerate(graph.slots):
        if not plan.shrinks(i):
            continue
        owner = slot.tensor
        cut(i, owner, partial(_put_data, owner))
        if owner.grad is not None:
            cut(i, owner.grad, partial(setattr, owner, "grad"))
        if i in averages:
            cut(i, averages[i], partial(_put_data, averages[i]))
        state = optimizer.state.get(owner, {}) if optimizer is not None else {}
        for key, value in state.items():
            if _follows(value, owner, f"optimizer: state '{key}' of '{slot.name}'"):
                cut(i, value, partial(state.__setitem__, key))
    with torch.no_grad():
        new = plan.gather(slot_of, tensors)
        new = [t.contiguous(memory_format=_format(old)) for t, old in zip(new, tensors, strict=True)]

    snapshot = Snapshot(graph.model, optimizer, ema)
    try:
        for put, tensor in zip(puts, new, strict=True):
            put(tensor)
        _history.record(plan, twins)
        for module, name, value in plan.attributes:
            for target in (module, *twins.get(module, ())):
                setattr(target, name, value)
    except BaseException:
        snapshot.restore()
        raise


def _follows(value: Any, owner: torch.Tensor, what: str) -> bool:
    """Whether a piece of optimizer state is cut with its parameter: along every dim where it has the same size.

    Raises:
        ArgumentError: it is neither shaped like the parameter nor a single number.
    """
    if not isinstance(value, (torch.Tensor, list, tuple, dict)) or (
        isinstance(value, torch.Tensor) and value.numel() == 1
    ):
        return False
    if isinstance(value, torch.Tensor) and value.dim() == owner.dim():
        sizes = zip(value.shape, owner.shape, strict=True)
        if all(mine in (1, theirs) for mine, theirs in sizes):
            return True
    raise ArgumentError(
        f"{what} is not shaped like the parameter, so it cannot be cut with it; prune without optimizer= and make "
        "a new optimizer afterwards"
    )


def _twin_modules(model: nn.Module, ema: nn.Module | None) -> dict[nn.Module, tuple[nn.Module, ...]]:
    """For each module of the model the one of the same name in its average, if there is an average."""
    named = dict(ema.named_modules()) if ema is not None else {}
    twins = {
        module: named.get(name) if name in named else named.get(f"module.{name}")
        for name, module in model.named_modules()
    }
    return {module: (twin,) for module, twin in twins.items() if twin is not None}


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


def _averages(graph: ChannelGraph, ema: nn.Module | None) -> dict[int, torch.Tensor]:
    if ema is None:
        return {}
    named = dict(ema.named_parameters())
    named.update(ema.named_buffers())
    found = {}
    for i, slot in enumerate(graph.slots):
        tensor = named.get(slot.name, named.get("module." + slot.name))
        if tensor is None:
            raise ArgumentError(f"ema: has no parameter or buffer named '{slot.name}'")
        if tensor.shape != slot.tensor.shape:
            raise ArgumentError(
                f"ema: '{slot.name}' has shape {tuple(tensor.shape)}, the model's {tuple(slot.tensor.shape)}"
            )
        found[i] = tensor
    return found
