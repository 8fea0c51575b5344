"""A few joint steps of gates, weights and head on the virtually compacted network, on the target data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..budget import Budget
from ..errors import ArgumentError
from ..graph import ChannelGraph
from ..graph._soft_cost import SoftCost
from .gates import BetaBernoulliGates
from .head import fit_head
from .statistics import reader_means

MODES = ("joint", "structure")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Knobs of the adaptation; the defaults are ours, chosen on the demo's task.

    Attributes:
        mode: "joint": all weights are trained along; "structure": only norms and the head, besides the gates.
    """

    mode: str = "joint"
    gate_lr: float = 0.05
    weight_lr: float = 0.01
    momentum: float = 0.9
    kl_scale: float = 1.0
    budget_scale: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(f"mode: must be one of {', '.join(MODES)}, got {self.mode!r}")


def adapt(
    graph: ChannelGraph,
    gates: BetaBernoulliGates,
    batches: Callable[[int], Iterable[Any]],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    budget: Budget,
    *,
    steps: int,
    set_size: int,
    generator: torch.Generator | None = None,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Keep probability of every class for this data set, float32 [num_classes], to be ranked globally.

    The model's parameters are trained along (they are what the smaller network inherits); its buffers are not touched.

    Args:
        gates: of `MaskGenerator.gates`, or `unconditional`; they are adapted in place.
        batches: gives that many batches; asked twice for `steps` of them, first to fit the head.
        budget: the expected cost is pushed towards it, and the live part of the network shrinks to it step by step.
        set_size: examples in the data set: the weight of the KL term is 1 / set_size.
    """
    with gradients_set_aside(graph.model):
        fit_head(graph, batches(steps), loss_fn)
        for _ in inner_steps(graph, gates, batches(steps), steps, loss_fn, budget, set_size, generator, settings):
            on_step()
    return gates.probability().detach().float().cpu()


def inner_steps(
    graph: ChannelGraph,
    gates: BetaBernoulliGates,
    batches: Iterable[Any],
    steps: int,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    budget: Budget,
    set_size: int,
    generator: torch.Generator | None,
    settings: Settings,
) -> Iterator[None]:
    """One step on every batch; the T inner steps of meta-training are these too."""
    optimizers = [torch.optim.Adam(gates.learned(), lr=settings.gate_lr)]
    weights = _trained(graph, settings.mode)
    if weights:
        optimizers.append(torch.optim.SGD(weights, lr=settings.weight_lr, momentum=settings.momentum))
    costs = [(SoftCost(graph, kind), ask) for kind, ask in budget.asked().items()]
    live = graph.all_kept()
    for step, batch in enumerate(batches):
        if step:
            live = _live_part(graph, gates, budget, step / steps, settings.floor)
        with torch.enable_grad():
            probability = gates.probability()
            excess = sum(torch.relu(cost(probability) / ask - 1) for cost, ask in costs)
            regular = settings.kl_scale / set_size * gates.kl() + settings.budget_scale * excess
            with graph.masked(live, gates.sample(generator)):
                # The backward too: activation checkpointing runs the forward again in it.
                (loss_fn(graph.model, batch) + regular).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield


def unconditional(graph: ChannelGraph, inputs: Any) -> BetaBernoulliGates:
    """Gates without a generator: the same start for all channels, but for the set's mean activations."""
    return BetaBernoulliGates(standardised(graph, reader_means(graph, inputs)).to(graph.device))


def _trained(graph: ChannelGraph, mode: str) -> list[nn.Parameter]:
    parameters = [p for p in graph.model.parameters() if p.requires_grad]
    if mode == "joint":
        return parameters
    norms = {id(p) for m in graph.model.modules() if isinstance(m, (_NormBase, nn.LayerNorm)) for p in m.parameters()}
    chosen = norms | {id(p) for p in graph.output_parameters()}
    return [p for p in parameters if id(p) in chosen]


@contextmanager
def gradients_set_aside(model: nn.Module) -> Iterator[None]:
    """The caller's gradients are neither trained on nor changed, and an optimizer that steps in the backward rests."""
    saved = [(p, p.grad) for p in model.parameters()]
    hooks = [table for p, _ in saved if (table := p._post_accumulate_grad_hooks)]
    contents = [table.copy() for table in hooks]
    try:
        for table in hooks:
            table.clear()
        for parameter, _ in saved:
            parameter.grad = None
        yield
    finally:
        for parameter, grad in saved:
            parameter.grad = grad
        for table, content in zip(hooks, contents, strict=True):
            table.update(content)


def standardised(graph: ChannelGraph, means: torch.Tensor) -> torch.Tensor:
    """Activation means with mean 0 and deviation 1 over each group; 0 where nothing was measured."""
    result = torch.zeros_like(means)
    for group in graph.groups:
        values = means[group.classes]
        known = ~values.isnan()
        if int(known.sum()) > 1:
            deviation = values[known].std()
            if deviation > 0:
                result[group.classes][known] = (values[known] - values[known].mean()) / deviation
    return result


def _live_part(
    graph: ChannelGraph, gates: BetaBernoulliGates, budget: Budget, progress: float, floor: float
) -> torch.Tensor:
    """Classes computed in this step: those of the highest probability, at a cost falling from 1 to the budget."""
    relaxed = {kind: 1 - (1 - ask) * progress for kind, ask in budget.asked().items()}
    return Budget(**relaxed).select(graph, gates.probability(), ranking="global", floor=floor, exact=False)
