"""What a report says in words, for its text and its page alike."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, NamedTuple

from ..budget import PROMISED, absolute, unit_of

if TYPE_CHECKING:
    from ..budget import Promise
    from .report import GroupVerdict, PruneReport

NOT_MEASURED = "not measured"
MISSED = "MISSED"  # what the sentence of a promise that was not kept begins with
_QUANTITIES = {
    "macs": "MACs",
    "params": "parameters",
    "channels": "prunable channels",
    "train_step": "training step",
    "latency": "forward in eval mode",
    "memory": "peak memory of a step",
}
_HARDLY = 1.05  # the same network measured twice differs by a few percent
_FEW, _HARDLY_OF_FEW = 2, 1.3  # and by tens of percent where so few steps are timed


class Row(NamedTuple):
    """One line of the ledger."""

    name: str
    before: str
    after: str
    ratio: str


def headline(report: PruneReport) -> list[str]:
    """What was found, what was asked, and when it pays: sentences, the most important one first."""
    return [
        _speed(report),
        _asked(report),
        *(_promise(promise, report) for promise in report.promises),
        _payback(report),
    ]


def _speed(report: PruneReport) -> str:
    before, after = report.train_step_ms_before, report.train_step_ms_after
    if before is None or after is None:
        return "Training time was not measured, so nothing here says that the pruned network is faster to train."
    times = f"a training step takes {figures(after)} ms, that of the dense network {figures(before)} ms"
    if after >= before:
        return f"The pruned network is NOT faster to train on this machine: {times}."
    if not clearly_faster(report):
        return (
            f"The pruned network is hardly faster to train on this machine: {times}, a difference like that of noise."
        )
    return (
        f"A training step takes {figures(after)} ms instead of {figures(before)} ms: {before / after:.2f}x less, "
        "measured on this machine."
    )


def clearly_faster(report: PruneReport) -> bool:
    """Whether the training step got shorter by more than times vary."""
    before, after = report.train_step_ms_before, report.train_step_ms_after
    if before is None or after is None:
        return False
    return before >= after * (_HARDLY if report.steps_timed > _FEW else _HARDLY_OF_FEW)


def _asked(report: PruneReport) -> str:
    asked = " and ".join(asked_of(name, value) for name, value in report.budget.items())
    macs, params = report.macs_after / max(report.macs_before, 1), report.params_after / max(report.params_before, 1)
    return (
        f"Asked of method '{report.method}': {asked}. Left: {percent(macs)} of the MACs and {percent(params)} of the "
        "parameters, which are no measure of time."
    )


def asked_of(name: str, value: float | str) -> str:
    """One unit of a budget: "50% of the MACs", "250 ms for the training step"."""
    quantity = _QUANTITIES.get(name, name)
    return f"{value.strip()} for the {quantity}" if isinstance(value, str) else f"{percent(value)} of the {quantity}"


def _promise(promise: Promise, report: PruneReport) -> str:
    """What was asked, then what is measured, in the unit of the ask; the other unit in brackets."""
    quantity, whole = _QUANTITIES[promise.unit], _amount(promise, promise.dense)
    measured, share = _amount(promise, promise.pruned), percent(promise.pruned / promise.dense)
    if isinstance(promise.asked, str):
        found = f"asked {asked_of(promise.unit, promise.asked)}, measured {measured} (the dense network takes {whole})"
    else:
        asked = f"{percent(promise.asked)} of the dense network's {quantity}"
        found = f"asked {asked}, measured {share} ({measured} instead of {whole})"
    if promise.kept:
        return f"Kept within {PROMISED:.0%}: {found}."
    off = f"{percent(abs(promise.missed_by))} {'more' if promise.missed_by > 0 else 'less'} than asked"
    if promise.missed_by < 0 and _held_by_others(promise, report):
        return f"Kept: {found}, {off}, since all asks hold at once and another one is tighter."
    return f"{MISSED}: {found}, {off}." + (f" {promise.why[0].upper()}{promise.why[1:]}." if promise.why else "")


def _held_by_others(promise: Promise, report: PruneReport) -> bool:
    """Whether another ask, and not this one, says how far the network had to shrink."""
    used = [1 + other.missed_by for other in report.promises if other is not promise]
    for name, before, after in (
        ("macs", report.macs_before, report.macs_after),
        ("params", report.params_before, report.params_after),
        ("channels", sum(g.channels for g in report.groups), sum(g.kept for g in report.groups)),
    ):
        if name in report.budget:
            used.append(after / max(before, 1) / report.budget[name])
    return any(share >= 1 - PROMISED for share in used)


def _amount(promise: Promise, value: float) -> str:
    """Milliseconds or megabytes; where an amount was asked, its unit."""
    unit = "MB" if promise.unit == "memory" else "ms"
    if isinstance(promise.asked, str):
        unit = unit_of(promise.asked)
    return f"{figures(value / absolute(promise.unit, f'1 {unit}'))} {unit}"


def _payback(report: PruneReport) -> str:
    spent = f"Pruning took {figures(report.prune_seconds)} s"
    steps, epochs = report.break_even_steps, report.break_even_epochs
    if report.train_step_ms_before is None or report.train_step_ms_after is None:
        return f"{spent}; when that is paid back is not known."
    if steps is None:
        return f"{spent}, which is never paid back in training time."
    if not clearly_faster(report):
        return f"{spent}; when that is paid back cannot be told from noise."
    when = f"{spent}, paid back in training time after {figures(steps, whole=True)} steps"
    if epochs is None:
        return f"{when}; the loader does not say how many steps an epoch has."
    many = figures(epochs) if epochs >= 1 else f"{epochs:.2g}"
    return f"{when}: break-even after {many} epochs of {report.steps_per_epoch:,} steps."


def ledger(report: PruneReport) -> list[Row]:
    """Costs before and after."""
    mb = [None if size is None else size / 1e6 for size in (report.peak_memory_before, report.peak_memory_after)]
    rows = [
        _row("MACs of an example (M)", report.macs_before / 1e6, report.macs_after / 1e6),
        _row("params (k)", report.params_before / 1e3, report.params_after / 1e3),
        _row("train step (ms)", report.train_step_ms_before, report.train_step_ms_after),
        _row("forward in eval mode (ms)", report.forward_ms_before, report.forward_ms_after),
        _row("peak memory of a step (MB)", *mb),
    ]
    if report.steps_per_epoch is None:
        return [*rows, Row("epoch (s): the loader has no length", "not known", "not known", "")]
    name = f"epoch of {report.steps_per_epoch:,} steps (s)"
    return [*rows, _row(name, report.epoch_seconds_before, report.epoch_seconds_after)]


def how_measured(report: PruneReport) -> str:
    """What the times are of; "" where there are none."""
    if report.train_step_ms_before is None:
        return ""
    many = "one step each" if report.steps_timed == 1 else f"median of {report.steps_timed} steps each"
    batch = f"the first batch ({report.batch_size} examples)" if report.batch_size else "the first batch"
    return (
        f"Times: {many}, dense and pruned in turns, forward, backward and SGD with momentum on {batch}; "
        f"{report.machine}. Loading the data is in none of them."
    )


def in_network_order(report: PruneReport) -> list[GroupVerdict]:
    """The groups as the forward comes to their layers; where a layer was not seen, its group follows the one before."""
    position = {name: i for i, name in enumerate(report.layer_ms_before)}
    placed, last = [], -1
    for group in report.groups:
        last = position.get(group.name, last)
        placed.append((last, group))
    return [group for _, group in sorted(placed, key=lambda pair: pair[0])]


def figures(value: float, whole: bool = False) -> str:
    """Three significant figures, and all of those before the point."""
    if whole or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def ratio(before: float, after: float) -> str:
    if not before or not after:
        return ""
    return f"{before / after:.2f}x less" if after <= before else f"{after / before:.2f}x more"


def short_paths(reason: str) -> str:
    """Source files relative to where they are imported from; the JSON keeps them whole."""
    for root in sorted({os.getcwd(), *sys.path}, key=len, reverse=True):
        if root.rstrip(os.sep):
            reason = reason.replace(f" at {root.rstrip(os.sep)}{os.sep}", " at ")
    return reason


def _row(name: str, before: float | None, after: float | None) -> Row:
    if before is None or after is None:
        return Row(name, NOT_MEASURED, NOT_MEASURED, "")
    return Row(name, figures(before), figures(after), ratio(before, after))
