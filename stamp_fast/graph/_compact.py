"""The cut itself: every new tensor is built first, then all are put in place, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ArgumentError
from ._plan import Plan

if TYPE_CHECKING:
    from .graph import ChannelGraph


def apply(graph: ChannelGraph, plan: Plan, optimizer: torch.optim.Optimizer | None, ema: nn.Module | None) -> None:
    """Cuts parameters, buffers, gradients, optimizer state and module attributes, in place.

    Parameter objects stay the same, so optimizers, tied modules and hooks keep hold of them.
    """
    slot_of: list[int] = []
    tensors: list[torch.Tensor] = []
    puts: list[Any] = []

    def cut(slot: int, tensor: torch.Tensor, put: Any) -> None:
        slot_of.append(slot)
        tensors.append(tensor)
        puts.append(put)

    averages = _averages(graph, ema)
    for i, slot in enumerate(graph.slots):
        if not plan.shrinks(i):
            continue
        tensor = slot.tensor
        cut(i, tensor.detach(), _Data(tensor))
        if tensor.grad is not None:
            cut(i, tensor.grad.detach(), _Grad(tensor))
        if i in averages:
            cut(i, averages[i].detach(), _Data(averages[i]))
        if optimizer is not None:
            for key, value in optimizer.state.get(tensor, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == tensor.shape:
                    cut(i, value, _State(optimizer.state[tensor], key))
    with torch.no_grad():
        new = [t.contiguous(memory_format=_format(old)) for t, old in zip(plan.gather(slot_of, tensors), tensors, strict=True)]

    done: list[tuple[Any, Any]] = []
    attributes: list[tuple[nn.Module, str, Any]] = []
    try:
        # Gradients have to go before the data they belong to can change shape.
        for put, tensor in zip(puts, new, strict=True):
            if isinstance(put, _Data):
                done.append((put, put.old()))
                put.set(tensor)
        for put, tensor in zip(puts, new, strict=True):
            if not isinstance(put, _Data):
                done.append((put, put.old()))
                put.set(tensor)
        for module, name, value in plan.attributes:
            attributes.append((module, name, getattr(module, name)))
            setattr(module, name, value)
    except BaseException:
        for module, name, value in reversed(attributes):
            setattr(module, name, value)
        for put, old in reversed(done):
            put.restore(old)
        raise


class _Data:
    """Storage of a parameter or buffer."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def old(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.tensor.data, self.tensor.grad

    def set(self, new: torch.Tensor) -> None:
        self.tensor.grad = None
        _replace_data(self.tensor, new)

    def restore(self, old: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        data, grad = old
        self.tensor.grad = None
        _replace_data(self.tensor, data)
        self.tensor.grad = grad


class _Grad:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def old(self) -> None:
        return None

    def set(self, new: torch.Tensor) -> None:
        self.tensor.grad = new

    def restore(self, old: None) -> None:
        self.tensor.grad = old


class _State:
    def __init__(self, state: dict, key: str) -> None:
        self.state = state
        self.key = key

    def old(self) -> torch.Tensor:
        return self.state[self.key]

    def set(self, new: torch.Tensor) -> None:
        self.state[self.key] = new

    def restore(self, old: torch.Tensor) -> None:
        self.state[self.key] = old


def _replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    # A gradient accumulator that an earlier graph keeps alive remembers the old shape; a change of dtype makes
    # autograd drop it, a change of shape alone does not.
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data


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
            raise ArgumentError(f"ema: '{slot.name}' has shape {tuple(tensor.shape)}, the model's {tuple(slot.tensor.shape)}")
        found[i] = tensor
    return found
