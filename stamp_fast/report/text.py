"""A report as plain text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from ..budget import written
from .timeline import OPTIMIZER, OTHER
from .words import figures, headline, how_measured, ledger, short_paths

if TYPE_CHECKING:
    from .report import GroupVerdict, PruneReport

_SHOWN = 3  # names in one cell; the JSON has all
_LAYERS = 8  # in the table of times
_MODULE = re.compile(r" in module '[^']*'")


def text(report: PruneReport) -> str:
    """The report in 110 columns; only notes may be wider."""
    console = Console(width=110, color_system=None, markup=False, emoji=False, highlight=False)
    with console.capture() as capture:
        for sentence in headline(report):
            console.print(sentence)
        for table in (_ledger(report), _layers(report), _pruned(report), _kept(report)):
            if table.row_count:
                console.print(table)
        for note in report.notes:
            console.print(f"note: {note}", soft_wrap=True)
        spent = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in report.seconds.items())
        console.print(f"spent: {spent}", soft_wrap=True)
        if report.backends:
            ran = ", ".join(f"{name} on {backend}" for name, backend in sorted(report.backends.items()))
            console.print(f"operators: {ran}", soft_wrap=True)
        if report.equality_error is not None:
            console.print(f"smaller network = masked dense network to {report.equality_error:.1e} (relative)")
        if how_measured(report):
            console.print(how_measured(report))
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def _ledger(report: PruneReport) -> Table:
    table = _table(f"pruned by '{report.method}' for {written(report.budget)}", "", "before", "after", "ratio")
    for row in ledger(report):
        table.add_row(*row)
    return table


def _layers(report: PruneReport) -> Table:
    """The slowest layers, and all others as one row each."""
    before, after = report.layer_ms_before, report.layer_ms_after
    table = _table("train step by layer, forward and backward (ms)", "layer", "before", "after")
    layers = [name for name in before if name not in (OPTIMIZER, OTHER)]
    slowest = sorted(layers, key=before.__getitem__, reverse=True)[:_LAYERS]
    rest = [name for name in layers if name not in slowest]
    named = [(name or "the model", [name]) for name in layers if name in slowest]
    if rest:
        named.append((f"{len(rest)} faster layer{'s' * (len(rest) != 1)}", rest))
    for shown, names in [*named, ("optimizer", [OPTIMIZER]), ("between layers, and the loss", [OTHER])]:
        sums = [sum(times.get(name, 0.0) for name in names) for times in (before, after)]
        if before:
            table.add_row(shown, *map(figures, sums))
    return table


def _pruned(report: PruneReport) -> Table:
    pruned = [group for group in report.groups if group.verdict == "pruned"]
    table = _table(f"pruned: {_groups(len(pruned))}", "layer", "before", "after")
    others = [_some([layer for layer in group.layers if layer != group.name]) for group in pruned]
    if any(others):
        table.add_column("together with", overflow="fold")
    for group, names in zip(pruned, others, strict=True):
        table.add_row(group.name, str(group.channels), str(group.kept), *[names] * any(others))
    return table


def _kept(report: PruneReport) -> Table:
    """One row for each reason: a network repeats its blocks, and with them a reason but for its module."""
    by_reason: dict[str, list[GroupVerdict]] = {}
    for group in report.groups:
        if group.verdict == "kept":
            by_reason.setdefault(_MODULE.sub("", group.reason), []).append(group)
    table = Table(title=f"kept: {_groups(sum(map(len, by_reason.values())))}", show_lines=True)
    table.add_column("layer (channels)", overflow="fold")
    table.add_column("reason", overflow="fold")
    for reason, groups in by_reason.items():
        reason = groups[0].reason if len({g.reason for g in groups}) == 1 else reason
        many = f"{len(groups)} groups: " if len(groups) > 1 else ""
        table.add_row(_some([f"{g.name} ({g.channels})" for g in groups], "\n"), many + short_paths(reason))
    return table


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title)
    table.add_column(first, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right")
    return table


def _groups(count: int) -> str:
    return f"{count} group" + "s" * (count != 1)


def _some(names: list[str], separator: str = ", ") -> str:
    more = len(names) - _SHOWN
    return separator.join(names if more <= 1 else [*names[:_SHOWN], f"and {more} more"])
