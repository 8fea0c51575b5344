"""Several budgets from one pass of statistics: what each of them costs, and one of them picked."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable, Collection, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ._phases import Phases, in_mode
from ._work import in_turns
from .budget import Budget, written
from .checks import check_arguments, check_model, check_prunable
from .cutting import chosen
from .data import Batches, LossFn, check_forward, cross_entropy, guarded, hits
from .errors import ArgumentError, BudgetError
from .graph import ChannelGraph, trace
from .graph._model import unwrapped
from .graph._snapshot import Snapshot
from .graph._undisturbed import attributes_restored, uncompiled
from .layer_costs import priced
from .methods import METHODS, Ranking, Request
from .prune import prune
from .recalibrate import recalibrate
from .stamp import Settings

_RECALIBRATION_BATCHES = 20
_HELD_OUT = 4  # batches of the loader, where none are given
_STATISTICS = ("taylor", "bn_scale", "magnitude", "random")  # scores that do not depend on the budget

Metric = Callable[[nn.Module, Any], tuple[float, int]]


@dataclasses.dataclass(frozen=True)
class Point:
    """One budget of a sweep.

    Attributes:
        budget: as it was asked.
        keep: bool, [num_classes]; None where the budget cannot be met.
        macs, params, train_step: fractions of the dense network's; the last is measured, in turns with it.
        score: what `metric` says of the network as it is right after the cut, batch norms calibrated, before training.
        front: no other point has both a smaller train step and a score as good.
        error: why it cannot be met; "" where it can.
    """

    budget: Budget
    keep: torch.Tensor | None = None
    macs: float = float("nan")
    params: float = float("nan")
    train_step: float = float("nan")
    score: float = float("nan")
    front: bool = False
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What several budgets leave of one network. `print` shows the table.

    Attributes:
        points: one for each budget, in the order asked; the first is the dense network.
    """

    points: list[Point]
    _model: nn.Module
    _loader: Iterable[Any]
    _shapes: list[torch.Size]
    _method: str
    _ranking: Ranking
    _options: dict[str, Any]

    def pick(self, index: int, **options: Any) -> nn.Module:
        """Prunes the model to one of the points, in place.

        Args:
            index: of `points`.
            options: of `prune`, such as optimizer=. With keep= or round_to= the channels are chosen anew, by the scores
                of the sweep.

        Raises:
            ArgumentError: no such point, or the dense network.
            BudgetError: the point's budget cannot be met.
            StampFastError: what `prune` raises.
        """
        if not isinstance(index, int) or isinstance(index, bool) or not 0 < index < len(self.points):
            raise ArgumentError(f"index: expected 1 to {len(self.points) - 1}, got {index!r}")
        if self._shapes != _shapes(self._model):
            raise ArgumentError("pick: the model is not the one that was swept any more: it has been cut; sweep again")
        if self.points[index].error:
            raise BudgetError(self.points[index].error)
        anew = bool({"keep", "round_to"} & options.keys())
        ranking = dataclasses.replace(self._ranking, keep=None if anew else self.points[index].keep)

        def scored(request: Request) -> Ranking:
            return ranking

        scored.__name__ = self._method
        options = {**self._options, "method": scored, **options}
        return prune(self._model, self._loader, budget=self.points[index].budget, **options)

    def to_csv(self, path: str | PathLike) -> Path:
        """One line for each point."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["budget", "macs", "params", "train_step", "score", "front", "error"])
            for point in self.points:
                values = (point.macs, point.params, point.train_step, point.score)
                writer.writerow([written(point.budget.asked()), *values, point.front, point.error])
        return Path(path)

    def plot(self, path: str | PathLike, title: str = "") -> Path:
        """Score over measured train step. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        met = [point for point in self.points if not point.error]
        best = sorted((point for point in met if point.front), key=lambda point: point.train_step)
        axes.plot([p.train_step for p in best], [p.score for p in best], "-", color="C0", label="Pareto front")
        for chosen_ones, style in ((best, {"color": "C0"}), ([p for p in met if not p.front], {"color": "0.6"})):
            axes.plot([p.train_step for p in chosen_ones], [p.score for p in chosen_ones], "o", **style)
        for point in met:
            place = {"xytext": (6, -11), "textcoords": "offset points", "fontsize": 8}
            axes.annotate(written(point.budget.asked()), (point.train_step, point.score), **place)
        axes.set_xlabel("time of a training step, of the dense network's (measured)")
        axes.set_ylabel("score right after the cut, before training")
        axes.grid(alpha=0.25)
        axes.legend()
        axes.set_title(title)
        figure.savefig(path)
        return Path(path)

    def __str__(self) -> str:
        table = Table(title="Fractions of the dense network; the train step is measured")
        for heading in ("", "budget", "MACs", "params", "train step", "score at once", "front"):
            table.add_column(heading, justify="left" if heading == "budget" else "right")
        for i, point in enumerate(self.points):
            if point.error:
                table.add_row(str(i), written(point.budget.asked()), "cannot be met", "", "", "", "")
                continue
            cells = [f"{value:.3f}" for value in (point.macs, point.params, point.train_step, point.score)]
            table.add_row(str(i), written(point.budget.asked()), *cells, "yes" if point.front else "")
        console = Console(width=100, color_system=None, markup=False, emoji=False, highlight=False)
        with console.capture() as capture:
            console.print(table)
            for point in self.points:
                if point.error:
                    console.print(point.error, soft_wrap=True)
        return capture.get().rstrip()


def sweep(
    model: nn.Module,
    loader: Iterable[Any],
    budgets: Sequence[Budget],
    *,
    method: str = "taylor",
    held_out: Iterable[Any] | None = None,
    metric: Metric | None = None,
    loss_fn: LossFn | None = None,
    example: Any = None,
    keep: Collection[str] = (),
    round_to: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Sweep:
    """Scores the channels once and says for every budget what is left and how good it is. The model stays whole.

    Args:
        model, loader, loss_fn, example, keep, round_to, seed: as `prune` takes them.
        budgets: any units, and several at once.
        method: one whose scores do not depend on the budget: "taylor", "bn_scale", "magnitude" or "random".
        held_out: batches that are scored; default: the loader's first four, which the channels were chosen on.
        metric: (network in eval mode, batch) -> (sum over the examples, how many), higher is better; default: correct
            answers.

    Returns:
        A budget that cannot be met is a point with its error.

    Raises:
        StampFastError: as `prune` does.
    """
    if not isinstance(budgets, Sequence) or not budgets or not all(isinstance(b, Budget) for b in budgets):
        raise ArgumentError(f"budgets: expected a list of Budget, got {budgets!r}")
    if method not in _STATISTICS:
        raise ArgumentError(
            f"method: must be one of {', '.join(_STATISTICS)}, whose scores hold for every budget, got {method!r}"
        )
    check_arguments(budgets[0], method, METHODS, 0, round_to, keep, None, seed, loss_fn, {})
    network = unwrapped(model)
    device = check_model(network)
    loss_fn, metric = guarded(loss_fn or cross_entropy), metric or hits
    phases = Phases(progress, 0)
    before = Snapshot(network, None, copy_values=True)
    try:
        with phases, uncompiled(), torch.random.fork_rng(enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with phases("load"):
                batches = Batches(loader, device)
                inputs = batches.inputs() if example is None else example
                scored = list(batches.take(_HELD_OUT) if held_out is None else Batches(held_out, device).one_pass())
            with phases("trace"), in_mode(network, training=False):
                with attributes_restored(network):
                    needs_training = check_forward(network, batches.first, loss_fn)
                graph = trace(network, inputs)
                graph.protect(keep)
                graph.settle()
                check_prunable(graph)
            with phases("score"), attributes_restored(network), in_mode(network, training=True):
                request = Request(
                    graph=graph,
                    batches=batches,
                    sample=([], None),
                    loss_fn=loss_fn,
                    budget=budgets[0],
                    steps=0,
                    seed=seed,
                    generator=None,
                    settings=Settings(),
                    reconstruction=False,
                    choose=lambda ranked: graph.all_kept(),
                    on_step=phases.advance,
                )
                ranking = METHODS[method](request)
            points = [Point(Budget(macs=1.0), graph.all_kept())]
            for budget in budgets:
                with phases("select"):
                    points.append(_selected(graph, ranking, budget, round_to, batches, loss_fn, inputs))
            with phases("measure"):
                points = _measured(graph, points, batches, scored, loss_fn, metric, needs_training)
    finally:
        before.restore()
    options = {"loss_fn": loss_fn, "example": example, "keep": keep, "round_to": round_to, "progress": progress}
    loader = batches if iter(loader) is loader else loader  # a generator is used up
    return Sweep(points, model, loader, _shapes(network), method, ranking, options)


def _shapes(model: nn.Module) -> list[torch.Size]:
    return [parameter.shape for parameter in model.parameters()]


def _selected(
    graph: ChannelGraph,
    ranking: Ranking,
    budget: Budget,
    round_to: int | None,
    batches: Batches,
    loss_fn: LossFn,
    inputs: Any,
) -> Point:
    try:
        fractions, steps = budget, round_to
        if budget.measured():
            fractions, steps = priced(graph, budget, round_to, batches.first, loss_fn, inputs)
        return Point(budget, chosen(graph, ranking, fractions, steps, strict=False))
    except BudgetError as error:
        return Point(budget, error=str(error))


def _measured(
    graph: ChannelGraph,
    points: list[Point],
    batches: Batches,
    scored: list[Any],
    loss_fn: LossFn,
    metric: Metric,
    needs_training: bool,
) -> list[Point]:
    met = [point for point in points if point.keep is not None]
    times = in_turns(graph, [point.keep for point in met], batches.first, loss_fn)
    found: dict[int, Point] = {}
    for point, milliseconds in zip(met, times, strict=True):
        found[id(point)] = dataclasses.replace(
            point,
            macs=graph.macs(point.keep) / graph.macs(),
            params=graph.params(point.keep) / graph.params(),
            train_step=milliseconds / times[0],
            score=_score(graph, point.keep, batches, scored, loss_fn, metric, needs_training),
        )
    return _fronted([found.get(id(point), point) for point in points])


def _fronted(points: list[Point]) -> list[Point]:
    """With `front` filled in."""
    met = [point for point in points if not point.error]

    def beats(one: Point, other: Point) -> bool:
        no_worse = one.train_step <= other.train_step and one.score >= other.score
        return no_worse and (one.train_step < other.train_step or one.score > other.score)

    return [
        dataclasses.replace(point, front=not point.error and not any(beats(other, point) for other in met))
        for point in points
    ]


def _score(
    graph: ChannelGraph,
    keep: torch.Tensor,
    batches: Batches,
    scored: list[Any],
    loss_fn: LossFn,
    metric: Metric,
    needs_training: bool,
) -> float:
    model = graph.model
    with attributes_restored(model), torch.no_grad(), graph.masked(keep):
        recalibrate(model, batches.take(_RECALIBRATION_BATCHES), loss_fn, needs_training)  # of copies of the buffers
        with in_mode(model, training=False):
            results = [metric(model, batch) for batch in scored]
    count = sum(examples for _, examples in results)
    if not count:
        raise ArgumentError("held_out: has no examples")
    return sum(float(value) for value, _ in results) / count
