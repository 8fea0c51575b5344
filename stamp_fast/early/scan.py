"""The oracle that the indicator is to match: a cut at every epoch, each trained to the end."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..errors import ArgumentError
from .early_pruner import EarlyPruner
from .indicator import settled


@dataclasses.dataclass(frozen=True)
class Scan:
    """Accuracy against the epoch of the cut.

    Attributes:
        epochs: after which it was cut, from 1.
        accuracies: at the end of the training, for each of `epochs`.
        indicators: EPI of every epoch from 1, as far as the dense training went.
        chosen: the epoch in which the indicator fires, or the cap; None if neither came.
        tau: what it has to reach.
    """

    epochs: list[int]
    accuracies: list[float]
    indicators: list[float]
    chosen: int | None
    tau: float

    @property
    def best(self) -> int:
        """The epoch with the best accuracy, the earliest of several."""
        return self.epochs[max(range(len(self.epochs)), key=lambda i: (self.accuracies[i], -i))]

    def accuracy(self, epoch: int) -> float:
        """At the end of the training that was cut after this epoch."""
        return self.accuracies[self.epochs.index(epoch)]

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        fields["indicators"] = [None if math.isnan(value) else value for value in self.indicators]
        return json.dumps(fields)

    @staticmethod
    def from_json(text: str) -> Scan:
        fields = json.loads(text)
        fields["indicators"] = [float("nan") if value is None else value for value in fields["indicators"]]
        return Scan(**fields)

    def plot(self, path: str | PathLike, title: str = "") -> Path:
        """Draws accuracy and EPI over the epoch of the cut, as the paper's figures do. Needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(7.5, 4.6), dpi=110, layout="constrained")
        FigureCanvasAgg(figure)
        left = figure.subplots()
        left.plot(self.epochs, [100 * a for a in self.accuracies], "o-", color="C0", label="accuracy at the end")
        left.plot([self.best], [100 * self.accuracy(self.best)], "*", color="C0", markersize=15, label="best")
        left.set_xlabel("cut after epoch")
        left.set_ylabel("test accuracy, %")
        left.grid(alpha=0.25)
        right = left.twinx()
        right.plot(range(1, len(self.indicators) + 1), self.indicators, "-", color="C1", label="EPI")
        right.axhline(self.tau, color="C1", linestyle=":", label=f"tau = {self.tau:g}")
        right.set_ylabel("early pruning indicator")
        if self.chosen is not None:
            left.axvline(self.chosen, color="black", linestyle="--", linewidth=1, label="chosen")
        lines = [line for axes in (left, right) for line in axes.get_legend_handles_labels()[0]]
        left.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="lower right")
        figure.suptitle(title)
        figure.savefig(path)
        return Path(path)


def scan(
    start: Callable[[], tuple[nn.Module, torch.optim.Optimizer, Any]],
    train_epoch: Callable[..., None],
    evaluate: Callable[[nn.Module], float],
    example: Any,
    epochs: int,
    *,
    at: Iterable[int] | None = None,
    progress: bool = True,
    **options: Any,
) -> Scan:
    """Trains once without a cut and, from each epoch of it, on with one; says what the indicator would have chosen.

    The training up to a cut is shared, so that n cuts cost less than n trainings.

    Args:
        start: makes a fresh model, its optimizer, and whatever else a training carries along (a schedule, or None).
        train_epoch: (model, optimizer, rest, epoch, observe) -> None trains one epoch, counted from 0. It calls
            `observe()` in every step, as in `EarlyPruner`, and seeds what is random by the epoch alone.
        evaluate: accuracy of a model.
        example: what a forward takes, as for `EarlyPruner`.
        epochs: of every training.
        at: epochs after which it is cut, from 1 to `epochs`; default: each.
        options: of `EarlyPruner`.

    Raises:
        ArgumentError: an epoch that is none of the training's.
        StampFastError: what `EarlyPruner` raises.
    """
    cuts = sorted(set(range(1, epochs + 1) if at is None else at))
    if not cuts or cuts[0] < 1 or cuts[-1] > epochs:
        raise ArgumentError(f"at: needs epochs from 1 to {epochs}, got {cuts}")
    cap = options.pop("cap", None)
    parts = start()
    watch = _Watch(*parts[:2], example, **options, cap=epochs + 1)
    accuracies: list[float] = []
    with tqdm(total=epochs + sum(epochs - e for e in cuts), desc="scan", disable=not progress) as bar:
        for epoch in range(1, epochs + 1):
            train_epoch(*parts, epoch - 1, watch.observe)
            bar.update()
            if epoch in cuts:
                with torch.random.fork_rng():
                    branch = copy.deepcopy(parts)
                    pruner = EarlyPruner(*branch[:2], example, **options, cap=epoch)
                    pruner.load_state_dict(watch.state_dict())
                    pruner.epoch_end()
                    for later in range(epoch, epochs):
                        train_epoch(*branch, later, pruner.observe)
                        bar.update()
                    accuracies.append(evaluate(branch[0]))
                bar.set_postfix(cut=epoch, accuracy=f"{accuracies[-1]:.3f}")
            watch.epoch_end()
    fires = (e for e in range(1, epochs + 1) if e == cap or settled(watch.indicators[:e], watch.tau, watch.window))
    return Scan(cuts, accuracies, watch.indicators, next(fires, None), watch.tau)


class _Watch(EarlyPruner):
    """Never cuts."""

    def _is_due(self) -> bool:
        return False
