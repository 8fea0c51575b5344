"""The report of one prune."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys

from rich.console import Console
from rich.table import Table

_SHOWN = 3  # names in one cell of the text; the JSON has all
_MODULE = re.compile(r" in module '[^']*'")


@dataclasses.dataclass(frozen=True)
class GroupVerdict:
    """What became of one group of channels.

    Attributes:
        name: the layer that emits the channels.
        channels: how many it had.
        kept: how many it has.
        verdict: "pruned" or "kept".
        reason: why it was kept; "" where it was pruned.
        layers: every layer whose output these channels are: they shrink together.
    """

    name: str
    channels: int
    kept: int
    verdict: str
    reason: str = ""
    layers: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class PruneReport:
    """Costs before and after, measured on this machine; see the attributes' units.

    Attributes:
        method: how channels were scored.
        budget: what was asked, fraction of the dense network by name.
        macs_before, macs_after: multiply-accumulates of one example's forward.
        params_before, params_after: parameters.
        train_step_ms_before, train_step_ms_after: median of a training step on the first batch, milliseconds,
            dense and pruned in turns; None where the model could not be copied.
        peak_memory_before, peak_memory_after: peak bytes allocated during a training step; None likewise.
        seconds: wall time of each phase.
        equality_error: largest difference between the smaller network and the masked dense one, relative, before
            statistics were recalibrated.
        backends: by operator, the implementation that ran (`stamp_fast.config`).
        groups: a verdict for every group.
        notes: what the user should know.
    """

    method: str
    budget: dict[str, float]
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    train_step_ms_before: float | None
    train_step_ms_after: float | None
    peak_memory_before: int | None
    peak_memory_after: int | None
    seconds: dict[str, float]
    equality_error: float | None
    backends: dict[str, str]
    groups: list[GroupVerdict]
    notes: list[str]

    def to_json(self) -> str:
        """The report as a JSON object; one key per attribute."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    def __str__(self) -> str:
        console = Console(width=110, color_system=None, markup=False, emoji=False, highlight=False)
        with console.capture() as capture:
            console.print(self._summary())
            for table in (self._pruned_table(), self._kept_table()):
                if table.row_count:
                    console.print(table)
            for note in self.notes:
                console.print(f"note: {note}", soft_wrap=True)
            spent = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in self.seconds.items())
            console.print(f"spent: {spent}", soft_wrap=True)
            if self.backends:
                ran = ", ".join(f"{name} on {backend}" for name, backend in sorted(self.backends.items()))
                console.print(f"operators: {ran}", soft_wrap=True)
            if self.equality_error is not None:
                console.print(f"smaller network = masked dense network to {self.equality_error:.1e} (relative)")
        return capture.get().rstrip()

    def _summary(self) -> Table:
        asked = ", ".join(f"{name}={fraction:g}" for name, fraction in self.budget.items())
        table = Table(title=f"pruned by '{self.method}' for {asked}")
        for heading in ("", "before", "after", "ratio"):
            table.add_column(heading, justify="left" if not heading else "right")
        rows = [
            ("MACs (M)", self.macs_before / 1e6, self.macs_after / 1e6),
            ("params (k)", self.params_before / 1e3, self.params_after / 1e3),
            ("train step (ms)", self.train_step_ms_before, self.train_step_ms_after),
            ("peak memory of a step (MB)", _megabytes(self.peak_memory_before), _megabytes(self.peak_memory_after)),
        ]
        for name, before, after in rows:
            if before is None or after is None:
                table.add_row(name, "not measured", "not measured", "")
            else:
                ratio = f"{before / after:.2f}x less" if after else ""
                table.add_row(name, f"{before:.1f}", f"{after:.1f}", ratio)
        return table

    def _pruned_table(self) -> Table:
        pruned = [group for group in self.groups if group.verdict == "pruned"]
        table = Table(title=f"pruned: {_groups(len(pruned))}")
        table.add_column("layer", overflow="fold")
        table.add_column("before", justify="right")
        table.add_column("after", justify="right")
        others = [_some([layer for layer in group.layers if layer != group.name]) for group in pruned]
        if any(others):
            table.add_column("together with", overflow="fold")
        for group, names in zip(pruned, others, strict=True):
            table.add_row(group.name, str(group.channels), str(group.kept), *[names] * any(others))
        return table

    def _kept_table(self) -> Table:
        """One row for each reason: a network repeats its blocks, and with them a reason but for its module."""
        by_reason: dict[str, list[GroupVerdict]] = {}
        for group in self.groups:
            if group.verdict == "kept":
                by_reason.setdefault(_MODULE.sub("", group.reason), []).append(group)
        table = Table(title=f"kept: {_groups(sum(map(len, by_reason.values())))}", show_lines=True)
        table.add_column("layer (channels)", overflow="fold")
        table.add_column("reason", overflow="fold")
        for reason, groups in by_reason.items():
            reason = groups[0].reason if len({g.reason for g in groups}) == 1 else reason
            many = f"{len(groups)} groups: " if len(groups) > 1 else ""
            table.add_row(_some([f"{g.name} ({g.channels})" for g in groups], "\n"), many + _short_paths(reason))
        return table


def _groups(count: int) -> str:
    return f"{count} group" + "s" * (count != 1)


def _some(names: list[str], separator: str = ", ") -> str:
    more = len(names) - _SHOWN
    return separator.join(names if more <= 1 else [*names[:_SHOWN], f"and {more} more"])


def _short_paths(reason: str) -> str:
    """Source files relative to where they are imported from; the JSON keeps them whole."""
    for root in sorted({os.getcwd(), *sys.path}, key=len, reverse=True):
        if root.rstrip(os.sep):
            reason = reason.replace(f" at {root.rstrip(os.sep)}{os.sep}", " at ")
    return reason


def _megabytes(size: int | None) -> float | None:
    return None if size is None else size / 1e6
