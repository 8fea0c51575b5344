"""Channel importance scores of the literature, over coupled channels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from ..errors import ArgumentError, ModelError
from ..graph import ChannelGraph
from ..graph.graph import Slot

_PIECE = 1 << 18  # elements worked on at a time


def _scatter(graph: ChannelGraph, totals: torch.Tensor, axis: torch.Tensor, values: torch.Tensor) -> None:
    live = axis >= 0
    totals.index_add_(0, axis[live], values.detach().float().cpu()[live])


def sum_of_others(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over every dim but one."""
    others = [d for d in range(values.dim()) if d != dim]
    return values.sum(others) if others else values


def magnitude(graph: ChannelGraph, p: int = 1) -> torch.Tensor:
    """L1 or L2 norm of all weights coupled to a class, those that emit it and those that read it.

    Li et al. 2017 (L1 norm of the filter), summed over the coupled weights as in DepGraph (Fang et al. 2023).

    Args:
        p: 1 or 2.

    Raises:
        ArgumentError: another `p`, or the network has been cut since it was traced.
    """
    if p not in (1, 2):
        raise ArgumentError(f"magnitude: p must be 1 or 2, got {p}")
    graph.check_current()
    axes, sums = [torch.empty(0, dtype=torch.long)], [torch.empty(0, device=graph.device)]
    with torch.no_grad():
        for slot in graph.slots:
            dims = [d for d, axis in enumerate(slot.axes) if axis is not None]
            if slot.is_parameter and len(slot.axes) > 1 and dims:
                axes += [slot.axes[d] for d in dims]
                sums += [found.to(graph.device) for found in _power_sums(slot.tensor.detach(), p, dims)]
        totals = torch.zeros(graph.num_classes, dtype=torch.float32)
        _scatter(graph, totals, torch.cat(axes), torch.cat(sums))  # one for all: most of them are a few numbers
    return totals if p == 1 else totals.sqrt()


def _power_sums(weight: torch.Tensor, p: int, dims: list[int]) -> list[torch.Tensor]:
    """Sums of |w| ** p over all dims but one, for each of `dims`; in pieces that stay in the cache."""
    rows = max(1, _PIECE // max(1, weight[0].numel()))
    by_row, column = [], None
    for piece in weight.split(rows):
        piece = piece.float().flatten(1)
        powers = piece.abs() if p == 1 else piece.square()
        if dims[0] == 0:
            by_row.append(powers.sum(1))
        if dims[-1] > 0:
            total = powers.sum(0)  # whole rows first: three times as fast as a sum over dims 0, 2, 3
            column = total if column is None else column.add_(total)
    if column is not None:
        column = column.view(weight.shape[1:])
    return [torch.cat(by_row) if d == 0 else sum_of_others(column, d - 1) for d in dims]


def bn_scale(graph: ChannelGraph) -> torch.Tensor:
    """Sum of |gamma| of the batch norms a class passes through (Network Slimming, Liu et al. 2017).

    Raises:
        ArgumentError: the network has been cut since it was traced.
        ModelError: a prunable group passes through no batch norm with a scale, so that it cannot be ranked.
    """
    graph.check_current()
    totals = torch.zeros(graph.num_classes, dtype=torch.float32)
    covered = torch.zeros(graph.num_classes, dtype=torch.bool)
    for slot in graph.slots:
        module, key = slot.owners[0]
        axis = slot.axes[0] if slot.axes else None
        if isinstance(module, _NormBase) and key == "weight" and axis is not None:
            _scatter(graph, totals, axis, slot.tensor.abs())
            covered[axis[axis >= 0]] = True
    for group in graph.prunable:
        if not covered[group.classes].all():
            raise ModelError(
                f"bn_scale: the channels of '{group.name}' pass through no batch norm with a scale; "
                f"keep that layer (keep=['{group.name}']) or use method='magnitude' or 'taylor'"
            )
    return totals


def random(graph: ChannelGraph, seed: int | None = None) -> torch.Tensor:
    """Uniform random scores: the baseline every other one has to beat.

    Raises:
        ArgumentError: the seed is no whole number.
    """
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ArgumentError(f"random: seed must be a whole number or None, got {seed!r}")
    generator = torch.Generator()
    if seed is not None:
        generator.manual_seed(seed)
    else:
        generator.seed()
    return torch.rand(graph.num_classes, generator=generator, dtype=torch.float32)


def taylor(
    graph: ChannelGraph,
    batches: Iterable[Any],
    loss_fn: Callable[[torch.nn.Module, Any], torch.Tensor],
) -> torch.Tensor:
    """First-order estimate of what removing a class does to the loss (Molchanov et al. 2019): |dL/dz| at z = 1.

    z scales every weight that reads the class, so dL/dz is the sum of w * dL/dw over all its readers; mean over
    batches of the absolute value. A class that no weight reads is scored by the weights that emit it instead.
    Gradients, statistics and training flags of the model are left as they were.

    Args:
        batches: what `loss_fn` understands.
        loss_fn: (model, batch) -> scalar loss.

    Raises:
        ArgumentError: no batch was given, or the loss is no scalar that depends on the model.
    """
    read = graph.read_by_weights()
    makers = [] if bool(read.all()) else [(s, dim) for s, dim in emitters(graph) if s.tensor.requires_grad]
    totals = torch.zeros(graph.num_classes, dtype=torch.float32)
    plan = graph.plan(graph.all_kept())
    count = 0
    for batch in batches:
        z = torch.ones(graph.num_classes, dtype=torch.float32, device=graph.device, requires_grad=True)
        with torch.enable_grad(), graph.masked(plan, z):
            loss = loss_fn(graph.model, batch)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
                raise ArgumentError("taylor: loss_fn must return a scalar tensor that depends on the model's output")
            weights = [slot.tensor for slot, _ in makers]
            grads = torch.autograd.grad(loss, [z, *weights], allow_unused=True)
        scores = (
            torch.zeros(graph.num_classes, dtype=torch.float32) if grads[0] is None else grads[0].detach().float().cpu()
        )
        emitted = torch.zeros(graph.num_classes, dtype=torch.float32)
        for (slot, dim), weight, grad in zip(makers, weights, grads[1:], strict=True):
            if grad is not None:
                product = weight.detach() * grad
                _scatter(graph, emitted, slot.axes[dim], sum_of_others(product, dim))
        totals += torch.where(read, scores, emitted).abs()
        count += 1
    if count == 0:
        raise ArgumentError("taylor: needs at least one batch")
    return totals / count


def emitters(graph: ChannelGraph) -> list[tuple[Slot, int]]:
    """Parameters with the dim along which they make channels rather than read them."""
    found = []
    for i, slot in enumerate(graph.slots):
        reading = graph.reader_dim(i)
        dims = [d for d, axis in enumerate(slot.axes) if axis is not None and d != reading]
        if slot.is_parameter and dims:
            found.append((slot, dims[0]))
    return found
