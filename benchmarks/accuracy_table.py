"""What `benchmarks.time_to_accuracy` has found, as Markdown, CSV and figures.

    python -m benchmarks.accuracy_table                # docs/time_to_accuracy.md, .csv and a PNG a network and target

Losses are printed like wins. Means over the seeds; the spread is the sample standard deviation.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .table import markdown_table
from .time_to_accuracy import ARMS, MARKS, RESULTS, rows

__all__ = ["Runs", "collect", "render"]

STAMP = ("STAMP, joint", "STAMP, structure")  # meta-trained; every other arm is one to compare with, or an ablation
NOT_BASELINES = (*STAMP, "STAMP, 0 steps", "STAMP, no generator")
_POINTS = 0.01


@dataclasses.dataclass(frozen=True)
class Runs:
    """All seeds of one arm at one place."""

    arm: str
    rows: Sequence[dict[str, Any]]

    def accuracies(self, step: int) -> list[float]:
        """One per seed; -1 is the end of the schedule."""
        return [
            next((a for s, _, a in row["curve"] if s == step), float("nan")) if step >= 0 else row["curve"][-1][2]
            for row in self.rows
        ]

    def accuracy(self, step: int) -> float:
        return statistics.fmean(self.accuracies(step))

    def spread(self, step: int) -> float:
        found = self.accuracies(step)
        return statistics.stdev(found) if len(found) > 1 else 0.0

    def mean(self, key: str) -> float:
        return statistics.fmean(row[key] for row in self.rows)

    @property
    def seconds(self) -> float:
        return statistics.fmean(row["curve"][-1][1] for row in self.rows)

    def seconds_to(self, accuracy: float) -> float | None:
        """Seconds, pruning included, to the first mark at which the mean over the seeds is that high."""
        for points in zip(*(row["curve"] for row in self.rows), strict=True):
            if statistics.fmean(a for _, _, a in points) >= accuracy:
                return statistics.fmean(s for _, s, _ in points)
        return None


class Place(NamedTuple):
    """Where all arms are compared."""

    network: str
    target: str
    steps: int
    lr: float

    @property
    def figure(self) -> str:
        return f"time_to_accuracy_{self.network}_{self.target}_{self.steps}_{self.lr:g}.png"

    def __str__(self) -> str:
        return f"{self.network} → {self.target}, {self.steps:,} steps, learning rate {self.lr:g}"


def collect(found: Iterable[dict[str, Any]]) -> dict[Place, dict[float, dict[str, Runs]]]:
    """By network, target and schedule; then by budget (1.0: dense); then by arm, in the order of `ARMS`."""
    gathered: dict[Place, dict[float, dict[str, list]]] = {}
    for row in found:
        place = Place(*(row[field] for field in Place._fields))
        gathered.setdefault(place, {}).setdefault(row["macs"], {}).setdefault(row["arm"], []).append(row)
    return {
        place: {
            macs: {arm: Runs(arm, by_arm[arm]) for arm in ARMS if arm in by_arm}
            for macs, by_arm in sorted(budgets.items(), reverse=True)
        }
        for place, budgets in gathered.items()
    }


def render(machine: dict[str, Any], places: dict[Place, dict[float, dict[str, Runs]]]) -> str:
    """The Markdown page."""
    parts = [
        "# Time to accuracy",
        "A network pretrained on rendered glyphs learns another data set: whole, and pruned in every way that people "
        "know. `python -m benchmarks.time_to_accuracy` made the rows ([all of them](time_to_accuracy.csv)), "
        "`python -m benchmarks.accuracy_table` this page.",
        f"Machine: {machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, torch "
        f"{machine['torch']}, several runs at a time: seconds are those that the one thread worked, and ratios mean "
        "more than seconds; bfloat16 autocast, channels_last, batch 64. Accuracy in percent on the first 3,000 test "
        "images, after so many steps of fine-tuning (± standard deviation over the seeds). Seconds include pruning "
        "and leave out evaluation. STAMP's own steps of adaptation are not among the steps, but among the seconds.",
    ]
    for place, budgets in places.items():
        parts.append(f"## {place}")
        parts.append(f"![accuracy against seconds]({place.figure})")
        dense = budgets.get(1.0, {}).get("dense")
        for macs, arms in budgets.items():
            if macs == 1.0 and len(budgets) > 1:
                continue
            shown = {"dense": dense, **arms} if dense else arms
            parts.append(f"### {macs:g} of the MACs")
            parts.append(_table(shown, dense, place.steps))
            parts += _verdicts(shown, dense, macs)
    return "\n\n".join(parts) + "\n"


def _table(arms: dict[str, Runs], dense: Runs | None, steps: int) -> str:
    marks = [mark for mark in MARKS if mark < steps]
    goal = dense.accuracy(-1) - _POINTS if dense else None
    header = ["", *(f"{mark:,}" for mark in marks), f"{steps:,} ±", "prune s", "total s", "to dense - 1", "step ms"]
    header += ["step MiB", "MACs", "seeds"]
    lines = []
    for name, runs in arms.items():
        reached = runs.seconds_to(goal) if goal is not None else None
        lines.append(
            [
                name,
                *(f"{100 * runs.accuracy(mark):.1f}" for mark in marks),
                f"{100 * runs.accuracy(-1):.1f} ± {100 * runs.spread(-1):.1f}",
                f"{runs.mean('pruning_seconds'):.1f}",
                f"{runs.seconds:.0f}",
                "never" if reached is None else f"{reached:.0f}",
                f"{runs.mean('step_ms'):.0f}",
                f"{runs.mean('peak_bytes') / 2**20:.0f}",
                f"{runs.mean('macs_reached'):.3f}",
                len(runs.rows),
            ]
        )
    return markdown_table(header, lines)


def _verdicts(arms: dict[str, Runs], dense: Runs | None, macs: float) -> list[str]:
    """The bars of the experiment, each met or missed by the first of `STAMP` that was run."""
    mine = next((arms[name] for name in STAMP if name in arms), None)  # chosen by name, not by its results
    baselines = [runs for name, runs in arms.items() if name not in NOT_BASELINES and name != "dense"]
    if mine is None or not baselines or dense is None:
        return []
    lines = []

    def line(met: bool, text: str) -> None:
        lines.append(f"- {'met' if met else '**missed**'}: {text}")

    best = max(baselines, key=lambda runs: runs.accuracy(-1) - runs.spread(-1))
    line(
        mine.accuracy(-1) >= best.accuracy(-1) - best.spread(-1),
        f"at the end {mine.arm} has {mine.accuracy(-1):.1%}; the best baseline less its spread, {best.arm}, has "
        f"{best.accuracy(-1) - best.spread(-1):.1%}",
    )
    if macs == 0.125 and not math.isnan(mine.accuracy(100)):
        best = max(baselines, key=lambda r: r.accuracy(100))
        lead = 100 * (mine.accuracy(100) - best.accuracy(100))
        line(
            lead >= 1,
            f"after 100 steps {mine.arm} is {lead:+.1f} points from the best baseline, {best.arm} (bar: +1; its own "
            "steps come on top of its 100)",
        )
    goal = dense.accuracy(-1) - _POINTS
    seconds, of_dense = mine.seconds_to(goal), dense.seconds_to(goal)
    if seconds is None:
        line(False, "dense - 1 point is not reached")
    else:
        share = seconds / dense.seconds
        line(
            share <= 1 / 3,
            f"{mine.arm} reaches dense - 1 point in {share:.2f} of dense's wall time (bar: 0.33), in "
            f"{seconds / of_dense:.2f} of the time in which dense reaches it",
        )
    share = mine.mean("pruning_seconds") / mine.seconds
    line(share < 0.1, f"pruning takes {share:.1%} of the total (bar: 10%)")
    return ["\n".join(lines)]


def write_csv(path: Path, found: Iterable[dict[str, Any]]) -> None:
    """One line a run and mark."""
    fields = ("network", "target", "macs", "arm", "seed", "steps", "lr", "macs_reached", "pruning_seconds", "step_ms")
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*fields, "peak_bytes", "step", "seconds", "accuracy"])
        for row in found:
            for step, seconds, accuracy in row["curve"]:
                known = [f"{row[f]:.6g}" if isinstance(row[f], float) else row[f] for f in fields]
                writer.writerow([*known, row["peak_bytes"], step, f"{seconds:.3f}", f"{accuracy:.4f}"])


def write_figure(path: Path, title: str, budgets: dict[float, dict[str, Runs]]) -> None:
    """Accuracy against seconds, a panel a budget, a line a method."""
    panels = [macs for macs in budgets if macs != 1.0] or [1.0]
    figure = Figure(figsize=(5.2 * len(panels), 5.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes_of = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    colours = {arm: f"C{i}" for i, arm in enumerate(a for a in ARMS if not a.startswith(("STAMP", "dense")))}
    colours |= {"dense": "black", "STAMP, joint": "crimson", "STAMP, structure": "crimson"}
    dashes = {"STAMP, structure": "--", "STAMP, no generator": ":", "STAMP, 0 steps": "-."}
    for axes, macs in zip(axes_of, panels, strict=True):
        for arm, runs in {**budgets.get(1.0, {}), **budgets[macs]}.items():
            points = [
                (statistics.fmean(s for _, s, _ in at), 100 * statistics.fmean(a for _, _, a in at))
                for at in zip(*(row["curve"] for row in runs.rows), strict=True)
                if max(s for _, s, _ in at) > 0  # the axis is logarithmic
            ]
            mine = arm.startswith("STAMP")
            axes.plot(
                *zip(*points, strict=True),
                label=arm,
                color=colours.get(arm, "crimson"),
                linestyle=dashes.get(arm, "-"),
                linewidth=2 if mine or arm == "dense" else 1,
                alpha=1 if mine or arm == "dense" else 0.75,
            )
        axes.set_xscale("log")
        axes.set_xlim(left=0.5)
        axes.set_ylim(_floor(runs for arms in budgets.values() for runs in arms.values()), 100)
        axes.set_xlabel("seconds, pruning included")
        axes.set_title(f"{macs:g} of the MACs")
        axes.grid(alpha=0.25)
    axes_of[0].set_ylabel("test accuracy, %")
    axes_of[-1].legend(fontsize=7, loc="lower right")
    figure.suptitle(title)
    figure.savefig(path)


def _floor(arms: Iterable[Runs]) -> float:
    """Percent below which nothing interesting happens: the worst arm after 50 steps, or the first mark from there."""
    return 100 * min(min(a for s, _, a in row["curve"] if s >= 50) for runs in arms for row in runs.rows) - 2


@click.command()
@click.option("--results", type=click.Path(path_type=Path, exists=True), default=RESULTS)
@click.option("--output", type=click.Path(path_type=Path), default=Path("docs"), help="A folder.")
def main(results: Path, output: Path) -> None:
    """Write the page, the CSV and the figures."""
    machine = json.loads(results.read_text().partition("\n")[0])["machine"]
    places = collect(rows(results))
    (output / "time_to_accuracy.md").write_text(render(machine, places))
    write_csv(output / "time_to_accuracy.csv", rows(results))
    for place, budgets in places.items():
        write_figure(output / place.figure, f"glyphs, {place}", budgets)


if __name__ == "__main__":
    main()
