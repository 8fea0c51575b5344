"""Importance of a neuron while the network trains: from its weights, or from the gradients that are there anyway."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from ..errors import ArgumentError, CheckpointError
from ..graph import ChannelGraph
from ..graph.graph import Slot
from ..importance.scores import emitters, sum_of_others


def filter_norms(graph: ChannelGraph) -> torch.Tensor:
    """L2 norm of a neuron's filter over the root of its number of parameters (equation 2): float32, [num_classes].

    Coupled filters count as one (our reading). A depthwise filter follows the neuron that it filters; classes that only
    such filters, or parameters of one dim, emit take those.
    """
    return _mean_square(graph, [_is_filter, _is_matrix, _any]).sqrt()


class GradientScores:
    """First-order estimate of what a neuron's removal does to the loss (equation 3), averaged over mini-batches.

    |gamma dL/dgamma + beta dL/dbeta| of the batch norms that a class passes through, |sum of w dL/dw| of the weights
    that emit it where there are none; summed over coupled neurons before the absolute value. It takes the parameters'
    own gradients: no forward, no backward, nothing of the size of an activation.

    Args:
        graph: trained on with an ordinary loop.

    Raises:
        ArgumentError: no parameter of a group's neurons is trained; names the group.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        trained = [found for found in _scored(graph) if found[0].tensor.requires_grad]
        normed = torch.zeros(graph.num_classes, dtype=torch.bool)
        for slot, _, axis, live in trained:
            if _is_norm(slot):
                normed[axis[live]] = True
        self._terms: list[tuple[Slot, int, torch.Tensor]] = []  # with the dim, and its positions that are scored
        classes, covered = [torch.empty(0, dtype=torch.long)], torch.zeros_like(normed)
        for slot, dim, axis, live in trained:
            live = live[normed[axis[live]] == _is_norm(slot)]
            if live.numel():
                self._terms.append((slot, dim, live.to(graph.device)))
                classes.append(axis[live])
                covered[axis[live]] = True
        for group in graph.prunable:
            if not bool(covered[group.classes].all()):
                raise ArgumentError(
                    f"importance: no parameter that makes the channels of '{group.name}' is trained, so that they have "
                    f"no gradient; keep=['{group.name}'], or importance='magnitude'"
                )
        self._classes = torch.cat(classes).to(graph.device)
        self._sum = torch.zeros(graph.num_classes, dtype=torch.float32, device=graph.device)
        self._batches = torch.zeros((), dtype=torch.float32, device=graph.device)
        self._seen = torch.zeros_like(self._batches)
        self._graph = graph

    @torch.no_grad()
    def add(self, scale: float = 1.0) -> None:
        """Takes the gradients of a mini-batch in. What is not finite, as after an overflow in float16, is left out.

        Raises:
            ArgumentError: no parameter has a gradient.
        """
        parts = []
        for slot, dim, live in self._terms:
            weight, grad = slot.tensor, slot.tensor.grad
            if grad is None:
                parts.append(self._sum.new_zeros(live.numel()))
            else:
                product = weight.float() * (grad.to_dense() if grad.is_sparse else grad).float()
                parts.append(sum_of_others(product, dim)[live])
        if all(slot.tensor.grad is None for slot, _, _ in self._terms):
            raise ArgumentError("observe: no parameter has a gradient; call it after backward(), before zero_grad()")
        signed = torch.zeros_like(self._sum).index_add_(0, self._classes, torch.cat(parts)) / scale
        finite = signed.isfinite().all()  # stays on the device: no wait for a GPU
        self._sum += torch.where(finite, signed.abs(), 0)
        self._batches += finite
        self._seen += 1

    def mean(self, total: Callable[[torch.Tensor], torch.Tensor] = lambda values: values) -> torch.Tensor:
        """Average over the mini-batches since `reset`: float32, [num_classes], on the CPU.

        Args:
            total: sums a tensor over the processes that train together.

        Raises:
            ArgumentError: there was none with finite gradients.
        """
        values = total(torch.cat([self._sum, self._batches[None], self._seen[None]])).cpu()
        scores, (finite, seen) = values[:-2], values[-2:]
        if not seen:
            raise ArgumentError("EarlyPruner: nothing was observed; call observe() in every step, after backward()")
        if not finite:
            raise ArgumentError(f"EarlyPruner: the gradients of all {int(seen)} steps observed are NaN or inf")
        for group in self._graph.prunable:
            if not bool(scores[group.classes].any()):
                raise ArgumentError(
                    f"EarlyPruner: the channels of '{group.name}' had no gradient in any of {int(seen)} steps; call "
                    f"observe() while all gradients are there, before zero_grad(), or keep=['{group.name}']"
                )
        return scores / finite

    def parameters(self) -> list[torch.nn.Parameter]:
        """Those whose gradients are looked at."""
        return [slot.tensor for slot, _, _ in self._terms]

    def reset(self) -> None:
        for counted in (self._sum, self._batches, self._seen):
            counted.zero_()

    def state_dict(self) -> dict[str, Any]:
        return {"sum": self._sum.tolist(), "batches": self._batches.item(), "seen": self._seen.item()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            CheckpointError: of a network with another number of classes.
        """
        if len(state["sum"]) != len(self._sum):
            raise CheckpointError(
                f"EarlyPruner: the state has gradients of {len(state['sum'])} classes, the network {len(self._sum)}; "
                "another network, or another keep="
            )
        self._sum.copy_(torch.tensor(state["sum"]))
        self._batches.fill_(state["batches"])
        self._seen.fill_(state["seen"])


def _mean_square(graph: ChannelGraph, kinds: list[Callable[[Slot], bool]]) -> torch.Tensor:
    """Per class, of all elements of the parameters that emit it, those of the first kind that do."""
    result = torch.zeros(graph.num_classes, dtype=torch.float32)
    open_ = torch.ones(graph.num_classes, dtype=torch.bool)
    made = _scored(graph)
    for kind in kinds:
        sums, counts = torch.zeros_like(result), torch.zeros_like(result)
        for slot, dim, axis, live in made:
            if kind(slot):
                sums.index_add_(0, axis[live], sum_of_others(slot.tensor.detach().float().square(), dim).cpu()[live])
                counts.index_add_(0, axis[live], torch.full_like(live, slot.tensor.numel() // len(axis)).float())
        take = open_ & (counts > 0)
        result[take] = sums[take] / counts[take]
        open_ &= ~take
    return result


def _scored(graph: ChannelGraph) -> list[tuple[Slot, int, torch.Tensor, torch.Tensor]]:
    """Parameters that emit classes, with the dim along which they do, its classes, and the positions that have one."""
    found = [(slot, dim, slot.axes[dim]) for slot, dim in emitters(graph)]
    return [(slot, dim, axis, (axis >= 0).nonzero().flatten()) for slot, dim, axis in found]


def _is_norm(slot: Slot) -> bool:
    return any(isinstance(module, _NormBase) for module, _ in slot.owners)


def _is_matrix(slot: Slot) -> bool:
    return slot.tensor.dim() > 1


def _is_filter(slot: Slot) -> bool:
    """Not a depthwise one, each of whose groups reads a single channel."""
    grouped = any(getattr(module, "groups", 1) > 1 for module, _ in slot.owners)
    return slot.tensor.dim() > 1 and not (grouped and slot.tensor.shape[1] == 1)


def _any(slot: Slot) -> bool:
    return True
