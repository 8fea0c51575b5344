"""Makes the report of a prune: what was measured, and what is said about it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from ..budget import Budget, promised
from ..data import Batches, LossFn, inputs_given
from ..errors import ArgumentError, CompactionError, LoaderError
from ..graph import ChannelGraph
from ..verify import Verification
from .measure import StepCost, compare_forwards, compare_steps, copy_of
from .report import GroupVerdict, PruneReport

_AT_LENGTH = 6.0  # seconds
_ONCE = (
    "each network's training step was timed once only, for it is slow: a repetition can differ by tens of percent, and "
    "single layers by more"
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Dense beside pruned, each pair in that order.

    Attributes:
        steps: of training.
        forward_ms: in eval mode; None where that was not measured.
        notes: what was not measured, and why.
    """

    steps: list[StepCost]
    forward_ms: list[float] | None
    notes: list[str]


def measured(
    dense: nn.Module | None,
    network: nn.Module,
    batch: Any,
    loss_fn: LossFn,
    at_length: bool = False,
    inputs: Any = None,
) -> Measured | None:
    """Measures the dense network, which is used up, beside a copy of the pruned one.

    Args:
        at_length: for some seconds, since a promise hangs on it.
        inputs: of a forward; None: those that the loss gives it of the batch.

    Returns:
        None where there is no dense one, since the model cannot be copied.

    Raises:
        LoaderError: the batch does for a forward, but not for a training step.
        CompactionError: the dense network can take a training step, the pruned one cannot.
    """
    if dense is None:
        return None
    models = [dense, copy_of(network)]
    try:
        steps = compare_steps(models, batch, loss_fn, *[_AT_LENGTH] * at_length)
    except LoaderError as error:
        compare_steps([dense], batch, loss_fn, seconds=0)  # raises where the batch is at fault
        raise CompactionError(
            f"prune: the smaller network cannot take a training step, which the dense one can: {error.__cause__}. What "
            "the forward does in training mode alone is not traced; a size may be fixed there. The model is unchanged; "
            "add the layer of that width to keep=."
        ) from error
    try:
        inputs = inputs_given(dense, loss_fn, batch) if inputs is None else inputs
        return Measured(steps, compare_forwards(models, inputs, *[_AT_LENGTH / 2] * at_length), [])
    except ArgumentError as error:
        why = str(error)
    except Exception as error:  # in eval mode the model may want other inputs than its loss gives it
        why = f"it raised {type(error).__name__} on what loss_fn gives it: {error}"
    return Measured(steps, None, [f"the forward in eval mode was not measured: {why}"])


def pruning_report(
    graph: ChannelGraph,
    kept: torch.Tensor,
    groups: list[GroupVerdict],
    method: str,
    budget: Budget,
    batches: Batches,
    costs: Measured | None,
    verified: Verification | None,
    seconds: dict[str, float],
    backends: dict[str, str],
) -> PruneReport:
    """The report of a prune that is done.

    Args:
        graph: of the dense network, as it was before the cut.
        kept: bool, [graph.num_classes].
        seconds: of every phase.
        backends: of every operator.
    """
    promises = promised(
        budget, by_unit(graph, kept, costs), lambda unit, ask: graph.cost_table.why_missed(unit, kept, ask)
    )
    notes = list(costs.notes) if costs else ["the train step was not measured: the model cannot be copied"]
    before, after = costs.steps if costs else (None, None)
    if costs and after.milliseconds >= before.milliseconds:
        notes.append("the pruned train step is NOT faster on this machine; try a larger batch or a smaller budget")
    if costs and after.steps == 1:
        notes.append(_ONCE)
    skipped = "verify=False" if verified is None else verified.skipped
    if skipped:
        notes.append(f"the smaller network was not compared with the masked dense one: {skipped}")
    forward = (costs and costs.forward_ms) or (None, None)
    return PruneReport(
        method=method,
        budget=budget.asked(),
        macs_before=graph.macs(),
        macs_after=graph.macs(kept),
        params_before=graph.params(),
        params_after=graph.params(kept),
        train_step_ms_before=before and before.milliseconds,
        train_step_ms_after=after and after.milliseconds,
        peak_memory_before=before and before.peak_bytes,
        peak_memory_after=after and after.peak_bytes,
        seconds=seconds,
        equality_error=verified and verified.error,
        backends=backends,
        groups=groups,
        notes=notes,
        forward_ms_before=forward[0],
        forward_ms_after=forward[1],
        layer_ms_before=before.layers if before else {},
        layer_ms_after=after.layers if after else {},
        steps_timed=after.steps if after else 0,
        batch_size=batches.batch_size(),
        steps_per_epoch=batches.length(),
        model=type(graph.model).__name__,
        machine=_machine(graph.device),
        promises=promises,
    )


def by_unit(graph: ChannelGraph, kept: torch.Tensor, costs: Measured | None) -> dict[str, tuple[float, float]]:
    """What budgets are measured by: of the dense network and the pruned one."""
    found: dict[str, tuple[float, float]] = {}
    if graph.cost_table is not None:  # measured before the cut; what was measured after it counts more
        found = {unit: graph.cost_table.measured(unit, kept) for unit in graph.cost_table.units}
    if costs is not None:
        before, after = costs.steps
        found["train_step"] = before.milliseconds, after.milliseconds
        found["memory"] = before.peak_bytes, after.peak_bytes
        if costs.forward_ms is not None:
            found["latency"] = costs.forward_ms[0], costs.forward_ms[1]
    return found


def _machine(device: torch.device) -> str:
    """What times depend on."""
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    else:
        threads = torch.get_num_threads()
        where = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} thread" + "s" * (threads != 1)
    return f"{where}, torch {torch.__version__}"
