"""The demo's figure: channels kept in every layer, and accuracy against seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    from stamp_fast.demo.run import DemoResult

TICKS = (0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 1)
ERROR_FLOOR = 0.002  # keeps 100% on the axis
GRAY, BLUE, PALE = "#5f6b7a", "#1668c1", "#dde3ea"


def write_figure(result: DemoResult, path: Path) -> None:
    """Writes the figure as PNG, whatever backend the process uses otherwise."""
    figure = Figure(figsize=(12.5, 5.2), dpi=120, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.35))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    draw_layers(left, result)
    draw_curves(right, result)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")


def layer_label(name: str) -> str:
    """`blocks.1.shortcut.0` reads `block 1 shortcut`."""
    parts = [part for part in name.removesuffix(".0").replace("blocks.", "block.").split(".") if part]
    return " ".join(parts)


def draw_layers(axes, result: DemoResult) -> None:
    names = [layer_label(name) for name, _, _ in result.layers]
    rows = range(len(names))
    axes.barh(rows, [before for _, before, _ in result.layers], color=PALE, height=0.72)
    axes.barh(rows, [after for _, _, after in result.layers], color=BLUE, height=0.72)
    for row, (_, before, after) in enumerate(result.layers):
        axes.text(before + 1, row, f"{after} of {before}", va="center", fontsize=9, color=GRAY)
    axes.set_yticks(rows, names, fontsize=9)
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * max(before for _, before, _ in result.layers))
    axes.set_xlabel("output channels")
    macs = result.pruned.macs / result.dense.macs
    axes.set_title(f"Channels kept by {result.method}: {macs:.0%} of the MACs", loc="left", fontsize=11)


def error_decades(accuracy: np.ndarray) -> np.ndarray:
    return -np.log10(np.maximum(1 - accuracy, 0) + ERROR_FLOOR)


def accuracy_at(decades: np.ndarray) -> np.ndarray:
    return 1 + ERROR_FLOOR - 10 ** -np.asarray(decades, float)


def draw_curves(axes, result: DemoResult) -> None:
    for arm, color in ((result.dense, GRAY), (result.pruned, BLUE)):
        reached = arm.seconds_to(result.target)
        label = f"{arm.name}: {arm.median_step_ms:.0f} ms a step, {result.target:.1%} after {reached:.1f} s"
        axes.plot(arm.seconds, arm.accuracy, color=color, lw=1.8, label=label)
        axes.plot([reached, reached], [0, result.target], color=color, lw=1, ls=":")
        axes.plot(reached, result.target, "o", color=color, ms=6)
    if result.pruned.prune_seconds > 0:
        axes.axvspan(0, result.pruned.prune_seconds, color=BLUE, alpha=0.12, lw=0, label="inside prune()")
    axes.axhline(result.target, color="black", lw=0.6, alpha=0.4)
    axes.set_xlim(left=0)
    # Logarithmic in the error, or everything that matters happens in the top two percent.
    axes.set_yscale("function", functions=(error_decades, accuracy_at))
    best = max(*result.dense.accuracy, *result.pruned.accuracy)
    axes.set_yticks(TICKS)
    axes.set_ylim(0, min((tick for tick in TICKS if tick > best), default=1))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    axes.grid(axis="y", alpha=0.25)
    axes.set_xlabel("seconds of fine-tuning and pruning, evaluation not counted")
    title = f"Test accuracy on cluttered digits; dots: {result.target:.1%} is reached and held"
    axes.set_title(title, loc="left", fontsize=11)
    axes.legend(loc="best", framealpha=0.9, edgecolor="none")
