"""Charts as inline SVG. Places along the width are percentages, so that text keeps its size on every screen."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from .timeline import OPTIMIZER, OTHER
from .words import figures, percent

if TYPE_CHECKING:
    from .report import GroupVerdict

_LAYERS = 24  # with a bar of their own
_FEWEST = 8  # columns that there is room for, so that two are not as wide as the page
_NUMBERS = 10  # under the columns; more would touch on a phone
_SHORT = {OPTIMIZER: "optimizer", OTHER: "between layers, and the loss", "": "the model"}
_KEYS = {"before": "dense", "after": "pruned", "cut": "removed", "stays": "stays", "whole": "group left whole"}


def layer_name(name: str) -> str:
    return escape(_SHORT.get(name, name))


def legend(*kinds: str) -> str:
    """What the colours mean, by their CSS classes."""
    keys = [
        f'<span><svg class="key"><rect class="{k}" width="100%" height="100%"/></svg>{_KEYS[k]}</span>' for k in kinds
    ]
    return f'<p class="legend">{" ".join(keys)}</p>'


def bars(label: str, shares: dict[str, float]) -> str:
    """Horizontal bars below each other.

    Args:
        label: what they say, in words.
        shares: of the width, in [0, 1], by CSS class.
    """
    rects = "".join(
        f'<rect class="{kind}" y="{9 * i}" width="{_percent(share)}" height="8"/>'
        for i, (kind, share) in enumerate(shares.items())
    )
    return f'<svg class="bars" height="{9 * len(shares)}" role="img"><title>{escape(label)}</title>{rects}</svg>'


def time_chart(before: dict[str, float], after: dict[str, float]) -> str:
    """Milliseconds of a training step by layer, two bars each: the slowest layers in network order, then the rest."""
    layers = [name for name in before if name not in (OPTIMIZER, OTHER)]
    slowest = set(sorted(layers, key=lambda name: max(before[name], after.get(name, 0.0)), reverse=True)[:_LAYERS])
    rest = [name for name in layers if name not in slowest]
    shown = [name for name in layers if name in slowest] + [OPTIMIZER, OTHER]
    most = max(max(before.get(name, 0.0), after.get(name, 0.0)) for name in shown)
    ticks = _ticks(most)
    rows = []
    for name in shown:
        dense, pruned = before.get(name, 0.0), after.get(name, 0.0)
        label = f"{_SHORT.get(name, name)}: {figures(dense)} ms dense, {figures(pruned)} ms pruned"
        drawn = bars(label, {"before": dense / ticks[-1], "after": pruned / ticks[-1]})
        rows.append(_time_row(layer_name(name), drawn, dense, pruned))
        if rest and name == shown[-3]:
            sums = [sum(times.get(other, 0.0) for other in rest) for times in (before, after)]
            rows.append(_time_row(f"<i>{len(rest)} faster layers together</i>", "", *sums))
    axis = "".join(
        f'<text x="{_percent(t / ticks[-1])}" y="12" text-anchor="{anchor}">{t:g}</text>'
        for t, anchor in zip(ticks, ["start", *["middle"] * (len(ticks) - 2), "end"], strict=True)
    )
    axis = f'<svg class="bars axis" height="16" aria-hidden="true">{axis}</svg>'
    return (
        legend("before", "after")
        + '<table class="rows"><thead><tr><th scope="col">layer</th><th scope="col">ms of a training step</th>'
        '<th scope="col" class="n">dense, ms</th><th scope="col" class="n">pruned, ms</th></tr></thead>'
        f'<tbody>{"".join(rows)}</tbody><tfoot><tr><td></td><td class="wide">{axis}</td>'
        "<td></td><td></td></tr></tfoot></table>"
    )


def channel_chart(groups: list[GroupVerdict]) -> str:
    """A column for every group, in the order given: its channels before, and what stays of them.

    Outputs of the model are left out: they are often far wider than the rest, and not the pruning's to choose.
    """
    shown = [(i, g) for i, g in enumerate(groups, 1) if not g.reason.startswith("output of the model")]
    if not shown:
        return ""
    ticks = _ticks(max(group.channels for _, group in shown))
    slot = 100 / max(len(shown), _FEWEST)
    every = next(k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, len(shown)) if len(shown) / k <= _NUMBERS)
    parts = []
    for tick in ticks:
        y = _percent(1 - tick / ticks[-1])
        parts.append(f'<line x1="0" x2="100%" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="-6" y="{y}" dy=".32em" text-anchor="end">{tick:,.0f}</text>')
    for place, (number, group) in enumerate(shown):
        x = f'x="{slot * (place + 0.1):.3f}%" width="{slot * 0.8:.3f}%"'
        whole = group.verdict == "kept"
        label = f"{number}. {group.name}: {group.channels} channels, {group.kept} stay"
        parts.append(f"<g><title>{escape(label)}</title>")
        if not whole:
            parts.append(_column(x, "cut", group.channels / ticks[-1]))
        parts.append(_column(x, "whole" if whole else "stays", group.kept / ticks[-1]) + "</g>")
        if number % every == 0 or every == 1:
            middle = f"{slot * (place + 0.5):.3f}%"
            parts.append(f'<text x="{middle}" y="100%" dy="1.3em" text-anchor="middle">{number}</text>')
    parts.append('<text x="-44" y="-16">channels</text>')
    parts.append('<text x="50%" y="100%" dy="2.9em" text-anchor="middle">groups, as numbered in the table below</text>')
    before, after = (sum(width) for width in zip(*[(g.channels, g.kept) for _, g in shown], strict=True))
    label = f"Columns of {len(shown)} groups: {after:,} of {before:,} channels stay, {percent(after / before)}."
    drawn = f'<svg class="plot" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'
    whole = ["whole"] * any(group.verdict == "kept" for _, group in shown)
    return legend("stays", "cut", *whole) + drawn


def _time_row(name: str, drawn: str, dense: float, pruned: float) -> str:
    numbers = f'<td class="n">{figures(dense)}</td><td class="n">{figures(pruned)}</td>'
    return f'<tr><th scope="row" class="name">{name}</th><td class="wide">{drawn}</td>{numbers}</tr>'


def _column(x: str, kind: str, share: float) -> str:
    return f'<rect class="{kind}" {x} y="{_percent(1 - share)}" height="{_percent(share)}"/>'


def _ticks(most: float) -> list[float]:
    """From 0 in three to five round steps to at least the most."""
    if most <= 0:
        return [0.0, 1.0]
    size = 10 ** math.floor(math.log10(most / 4))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if most / (size * k) <= 4)
    return [step * i for i in range(math.ceil(most / step - 1e-9) + 1)]


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
