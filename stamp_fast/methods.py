"""The methods by name. A method is only how a score per class comes about; everything else is shared."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from . import importance
from .budget import Budget
from .data import Batches, LossFn
from .graph import ChannelGraph
from .stamp import MaskGenerator, Settings, adapt, unconditional

_TAYLOR_BATCHES = 8
# Global rankings may starve a layer on a handful of batches: this fraction of every group stays.
_FLOOR = 0.1


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Scores, and how `Budget.select` is to compare them.

    Attributes:
        scores: float, [graph.num_classes], higher = keep.
        ranking: "global" compares them across groups; "local" takes the same fraction of every group.
        floor: fraction of each group that stays whatever its scores.
        exact: with False a choice that fits is good enough, however far below the budget.
        folded: what goes was folded into what stays by the method itself.
        keep: bool, [graph.num_classes]: the choice, where it has been made for this budget already.
    """

    scores: torch.Tensor
    ranking: str
    floor: float = 0.0
    exact: bool = True
    folded: bool = False
    keep: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What a method may look at.

    Attributes:
        graph: of the dense network, settled; `graph.groups[i].classes` is a group's slice of the scores.
        batches: of the loader, on the model's device: `take(count)` gives so many, anew each time.
        sample: inputs of a few forwards, and the classes of their examples where they are known; empty where neither
            method "stamp" nor `reconstruction` is asked for.
        loss_fn: (model, batch) -> scalar.
        budget: in fractions of the dense network, even where amounts were asked.
        steps, seed, reconstruction: as `prune` was given them.
        generator, settings: of method "stamp".
        choose: what stays under the budget for a ranking: bool, [graph.num_classes].
        on_step: to be called after each of `steps`, for the progress bar.
    """

    graph: ChannelGraph
    batches: Batches
    sample: tuple[list[Any], torch.Tensor | None]
    loss_fn: LossFn
    budget: Budget
    steps: int
    seed: int | None
    generator: MaskGenerator | None
    settings: Settings
    reconstruction: bool
    choose: Callable[[Ranking], torch.Tensor]
    on_step: Callable[[], None]


def _stamp(request: Request) -> Ranking:
    generator = torch.Generator()
    if request.seed is not None:
        generator.manual_seed(request.seed)
    else:
        generator.seed()
    inputs, labels = request.sample
    if request.generator is None:
        gates = unconditional(request.graph, inputs)
    else:
        gates = request.generator.gates(request.graph, inputs, labels, request.budget)
    settings = request.settings
    scores = adapt(
        request.graph,
        gates,
        request.batches.take,
        request.loss_fn,
        request.budget,
        lambda scores: request.choose(Ranking(scores, "global", settings.floor)),
        steps=request.steps,
        set_size=request.batches.size(),
        folds=inputs if request.reconstruction else None,
        generator=generator,
        settings=settings,
        on_step=request.on_step,
    )
    folded = request.reconstruction and settings.mode == "joint" and request.steps > 0
    return Ranking(scores, "global", settings.floor, folded=folded)


def _taylor(request: Request) -> Ranking:
    batches = request.batches.take(_TAYLOR_BATCHES)
    return Ranking(importance.taylor(request.graph, batches, request.loss_fn), "global", _FLOOR)


def _bn_scale(request: Request) -> Ranking:
    return Ranking(importance.bn_scale(request.graph), "global", _FLOOR)


def _magnitude(request: Request) -> Ranking:
    return Ranking(importance.magnitude(request.graph), "local")


def _random(request: Request) -> Ranking:
    return Ranking(importance.random(request.graph, request.seed), "local")


METHODS: dict[str, Callable[[Request], Ranking]] = {
    "stamp": _stamp,
    "taylor": _taylor,
    "magnitude": _magnitude,
    "bn_scale": _bn_scale,
    "random": _random,
}
