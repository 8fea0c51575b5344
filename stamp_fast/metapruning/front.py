"""What one PruningNet offers for several budgets: accuracy against cost."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from ..budget import Budget
from ..errors import ArgumentError
from .genome import Genome
from .pruning_net import PruningNet
from .search import Metric, Scores, search


@dataclasses.dataclass(frozen=True)
class Front:
    """The best genome of each budget.

    Attributes:
        unit: what the budgets are of: "macs", "params" or "latency".
        budgets: fractions of the widest network.
        genomes, scores: of each.
        all: cost and score of every genome that was tried.
    """

    unit: str
    budgets: list[float]
    genomes: list[Genome]
    scores: list[float]
    all: list[tuple[float, float]]

    def to_csv(self, path: str | PathLike) -> Path:
        """One line per budget."""
        with open(path, "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["budget", "unit", "cost", "score", "ids"])
            for budget, genome, score in zip(self.budgets, self.genomes, self.scores, strict=True):
                cost = getattr(genome.space.graph, self.unit)(genome.keep)
                ids = " ".join(map(str, genome.ids))
                writer.writerow([budget, self.unit, cost, score, ids])
        return Path(path)

    def plot(self, path: str | PathLike, title: str = "") -> Path:
        """Score over cost. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(*zip(*self.all, strict=True), ".", color="0.75", markersize=4, label="tried")
        costs = [getattr(g.space.graph, self.unit)(g.keep) / getattr(g.space.graph, self.unit)() for g in self.genomes]
        axes.plot(costs, self.scores, "o-", color="C0", label="best of each budget")
        axes.set_xlabel(f"{self.unit}, of the widest network")
        axes.set_ylabel("score on generated weights")
        axes.grid(alpha=0.25)
        axes.legend()
        axes.set_title(title)
        figure.savefig(path)
        return Path(path)


def front(
    net: PruningNet,
    calibration: Iterable[Any],
    validation: Iterable[Any],
    *,
    budgets: Sequence[Budget],
    metric: Metric | None = None,
    checkpoint: Any = None,
    **options: Any,
) -> Front:
    """Searches for every budget; what one search has scored no other scores again, and all choose among all.

    Args:
        budgets: all of the same one unit, in any order.
        options: of `search`.

    Raises:
        ArgumentError: no budgets, or of several units.
        StampFastError: what `search` raises.
    """
    if not all(isinstance(budget, Budget) for budget in budgets):
        raise ArgumentError(f"budgets: expected a list of Budget, got {budgets!r}")
    units = {name for budget in budgets for name in budget.asked()}
    if len(units) != 1 or any(len(budget.asked()) != 1 for budget in budgets):
        raise ArgumentError(
            f"budgets: have to be of one unit, e.g. all of macs, got {', '.join(sorted(units)) or None}"
        )
    (unit,) = units
    scores = Scores(net, calibration, validation, metric, checkpoint)
    ordered = sorted(budgets, key=lambda budget: budget.asked()[unit])
    found = [search(net, (), (), budget=budget, scores=scores, **options) for budget in ordered]
    graph, at_least = net.space.graph, options.get("at_least", 0.0)

    def best() -> list[tuple[int, ...]]:
        chosen = [genome.ids for genome in found]
        for i, budget in enumerate(ordered):
            for ids, score in scores.known.items():
                if score > scores.known[chosen[i]] and at_least <= budget.used(graph, net.space.keep(ids)) <= 1:
                    chosen[i] = ids
        return chosen

    found = [net.space.genome(ids) for ids in scores.processes.from_first(best)]
    cost = getattr(graph, unit)
    tried = [(cost(net.space.genome(ids).keep) / cost(), score) for ids, score in scores.known.items()]
    fractions = [budget.asked()[unit] for budget in ordered]
    return Front(unit, fractions, found, [scores.known[g.ids] for g in found], tried)
