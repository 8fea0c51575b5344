"""A few steps on the target data: of the gates that choose channels and, in mode "joint", of the weights that stay.

The paper adapts structure and weights together (arXiv 2006.12139; our reading). Here they take turns: weights that are
trained under masks that are sampled, or that change from step to step, were 1 to 3 points worse after 100 steps of
fine-tuning (glyphs -> Fashion-MNIST, an eighth of the MACs) than weights left alone until the mask is fixed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..budget import Budget
from ..data import LossFn
from ..errors import ArgumentError, BudgetError
from ..graph import ChannelGraph
from ..graph._soft_cost import soft_cost
from ..graph._undisturbed import attributes_restored
from ..reconstruct import reconstruct
from .gates import BetaBernoulliGates
from .head import fit_head, fixed, stepping
from .mask_generator import MODES, l1_ranks
from .statistics import reader_means

HEAD_STEPS = 10
_FAST_WIDTH = 8  # others take longer than the next multiple of it: bfloat16 on a VGG, a third more


@dataclasses.dataclass(frozen=True)
class Settings:
    """Knobs of the adaptation; the defaults are ours, chosen on glyphs -> Fashion-MNIST.

    Attributes:
        mode: "joint": a quarter of the steps is for the gates, which meta-training has prepared for as few (without a
            generator they were no worse for it either); once the mask is fixed, the weights that stay are trained for
            all of them. "structure": all are for the gates.
        floor: fraction of every group that stays.
    """

    mode: str = "joint"
    gate_lr: float = 0.05
    weight_lr: float = 0.02
    momentum: float = 0.9
    kl_scale: float = 1.0
    budget_scale: float = 1.0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ArgumentError(f"mode: must be one of {', '.join(MODES)}, got {self.mode!r}")

    def split(self, steps: int) -> tuple[int, int]:
        """Steps of the gates, and of the weights."""
        return (math.ceil(steps / 4), steps) if self.mode == "joint" else (steps, 0)


def adapt(
    graph: ChannelGraph,
    gates: BetaBernoulliGates,
    batches: Callable[[int], Iterable[Any]],
    loss_fn: LossFn,
    budget: Budget,
    choose: Callable[[torch.Tensor], torch.Tensor],
    *,
    steps: int,
    set_size: int,
    folds: Any = None,
    generator: torch.Generator | None = None,
    settings: Settings = Settings(),  # noqa: B008  (frozen)
    on_step: Callable[[], None] = lambda: None,
) -> torch.Tensor:
    """Keep probability of every class for this data set, float32 [num_classes].

    The head is fitted to the data and, in mode "joint", the weights that stay are trained (they are what the smaller
    network inherits); buffers are not touched.

    Args:
        gates: of `MaskGenerator.gates`, or `unconditional`; they are adapted in place.
        batches: gives that many batches, from the start of the data each time.
        budget: the expected cost is pushed towards it, and the live part of the network shrinks to it step by step.
        choose: from the probabilities to the classes that stay, bool [num_classes].
        set_size: examples in the data set: the weight of the KL term is 1 / set_size.
        folds: what `reconstruct` folds on before weights are trained, in mode "joint"; None leaves it out.
    """
    of_gates, of_weights = settings.split(steps)
    with gradients_set_aside(graph.model):
        with attributes_restored(graph.model):  # what a forward leaves there would trip the replay in `choose`
            fit_head(graph, batches(HEAD_STEPS), loss_fn)
            first = batches(of_gates)
            for _ in gate_steps(graph, gates, first, of_gates, loss_fn, budget, set_size, generator, settings):
                on_step()
        probability = gates.probability().detach().float().cpu()
        if of_weights:
            keep = choose(probability)
            if folds is not None:
                reconstruct(graph, keep, folds)
            for _ in weight_steps(graph, keep, batches(of_weights), loss_fn, settings):
                on_step()
    return probability


def gate_steps(
    graph: ChannelGraph,
    gates: BetaBernoulliGates,
    batches: Iterable[Any],
    steps: int,
    loss_fn: LossFn,
    budget: Budget,
    set_size: int,
    generator: torch.Generator | None,
    settings: Settings,
) -> Iterator[None]:
    """One step of the gates on every batch; the inner steps of meta-training are these too."""
    optimizer = torch.optim.Adam(gates.learned(), lr=settings.gate_lr)
    costs = [(soft_cost(graph, kind), ask) for kind, ask in budget.asked().items()]
    live = graph.all_kept()
    for step, batch in enumerate(batches):
        if step:
            live = _live_part(graph, gates, budget, step / steps, settings.floor)
        with torch.enable_grad(), fixed(graph.model.parameters()):
            probability = gates.probability()
            excess = sum(torch.relu(cost(probability) / ask - 1) for cost, ask in costs)
            regular = settings.kl_scale / set_size * gates.kl() + settings.budget_scale * excess
            with graph.masked(live, gates.sample(generator)):
                # The backward too: activation checkpointing runs the forward again in it.
                (loss_fn(graph.model, batch) + regular).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        yield


def weight_steps(
    graph: ChannelGraph, keep: torch.Tensor, batches: Iterable[Any], loss_fn: LossFn, settings: Settings
) -> Iterator[None]:
    """One step of the weights that stay on every batch, at the cost of the smaller network."""
    weights = [p for p in graph.model.parameters() if p.requires_grad]
    if not weights:
        return
    options = {"lr": settings.weight_lr, "momentum": settings.momentum, "nesterov": True}
    step = stepping(torch.optim.SGD, weights, **options)
    plan = graph.plan(keep)
    for batch in batches:
        with torch.enable_grad(), graph.masked(plan):
            loss_fn(graph.model, batch).backward()
        step()
        yield


def unconditional(graph: ChannelGraph, inputs: Any) -> BetaBernoulliGates:
    """Gates without a generator: they start from the L1 norm, with equal shares of every group.

    Args:
        inputs: what a forward takes, or a list of that: the images whose mean activations the gates scale with.
    """
    statistic = standardised(graph, reader_means(graph, inputs))
    return BetaBernoulliGates(statistic, beta=l1_ranks(graph)).to(graph.device)


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
    options = {"ranking": "global", "floor": floor, "exact": False}
    try:
        return Budget(**relaxed).select(graph, gates.probability(), round_to=_FAST_WIDTH, **options)
    except BudgetError:  # layers too narrow for it
        return Budget(**relaxed).select(graph, gates.probability(), **options)
