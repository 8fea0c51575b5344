"""Runs the smaller network on meta tensors and compares every operator with what the labels predict (DESIGN 3.4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import CompactionError, TraceError
from . import _plan, _record
from ._align import VIEWS, base_name
from ._record import Call, Recording, Ref

if TYPE_CHECKING:
    from .graph import ChannelGraph

# Integer arguments of these are sizes; the shapes that are compared anyway follow from them.
_SIZE_ARGUMENTS = {
    "native_layer_norm": (1,),
    "native_group_norm": (3, 4, 5),
    "zeros": (0,),
    "ones": (0,),
    "full": (0,),
    "empty": (0,),
    "rand": (0,),
    "randn": (0,),
    "new_zeros": (1,),
    "new_ones": (1,),
    "new_full": (1,),
    "new_empty": (1,),
    "empty_strided": (0, 1),
    "new_empty_strided": (1, 2),
}


def check(graph: ChannelGraph, plan: _plan.Plan) -> None:
    """Raises CompactionError at the first operator that differs from the prediction. Changes nothing."""
    shapes = graph._core.shapes(graph._bytes(plan.keep))
    derived = {(op, arg): value for op, arg, value in graph._core.scalar_args(graph._bytes(plan.keep))}
    small = {}
    for i, slot in enumerate(graph.slots):
        if plan.shrinks(i):
            tensor = torch.empty(plan.shape(i), dtype=slot.tensor.dtype, device="meta")
            small[i] = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad) if slot.is_parameter else tensor
    old = graph.recording
    try:
        with _plan.swapped(plan, small):
            new = _record.record(graph.model, graph.example)
    except TraceError as error:
        raise _failure(graph, shapes, _first_failed(graph, error), str(error.__cause__ or error)) from error
    cuts = _Slices(graph, plan, new, shapes)
    old_ops = [(i, call) for i, call in enumerate(old.calls) if base_name(call.name) not in VIEWS]
    new_ops = [(j, call) for j, call in enumerate(new.calls) if base_name(call.name) not in VIEWS]
    for (i, was), (j, now) in zip(old_ops, new_ops, strict=False):
        problem = _difference(i, was, now, old, new, shapes, derived) or cuts.difference(i, j)
        if problem:
            raise _failure(graph, shapes, i, problem)
    if len(old_ops) != len(new_ops):
        last = old_ops[min(len(old_ops), len(new_ops)) - 1][0]
        raise _failure(graph, shapes, last, f"runs {len(new_ops)} operators instead of {len(old_ops)}")


def _difference(
    op: int, was: Call, now: Call, old: Recording, new: Recording, shapes: list[tuple], derived: dict
) -> str:
    if was.name != now.name:
        return f"calls {now.name} instead"
    exempt = _SIZE_ARGUMENTS.get(base_name(was.name), ())
    for position, (a, b) in enumerate(zip(was.args, now.args, strict=True)):
        if (op, position) in derived:
            if b != derived[op, position]:
                return f"argument {position} is {b} where {derived[op, position]} is predicted"
        elif position not in exempt:
            problem = _value_difference(a, b, old, new, shapes)
            if problem:
                return f"argument {position} {problem}"
    for a, b in zip(was.outs, now.outs, strict=True):
        if tuple(shapes[a]) != new.shapes[b]:
            return f"gives shape {new.shapes[b]} where {tuple(shapes[a])} is predicted"
    return ""


def _value_difference(a: Any, b: Any, old: Recording, new: Recording, shapes: list[tuple]) -> str:
    if isinstance(a, Ref):
        if not isinstance(b, Ref):
            return f"is {b} where a tensor is predicted"
        if tuple(shapes[a]) != new.shapes[b]:
            return f"has shape {new.shapes[b]} where {tuple(shapes[a])} is predicted"
        was, now = old.values.get(a), new.values.get(b)
        if was is not None and now is not None and len(was) == len(now) and was != now and was == was:
            return f"is the constant {now} where {was} is predicted"
        return ""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            problem = _value_difference(x, y, old, new, shapes)
            if problem:
                return problem
        return ""
    return "" if a == b or (a != a and b != b) else f"is {b} where {a} is predicted"


class _Slices:
    """Where slices start, predicted and replayed. Their lengths show in shapes, their offsets nowhere else."""

    def __init__(self, graph: ChannelGraph, plan: _plan.Plan, new: Recording, shapes: list[tuple]) -> None:
        keep = graph._bytes(plan.keep)

        def moved(tensor: int, dim: int, position: int) -> int:
            axis = graph._core.axis_of(tensor, dim)
            return position if axis < 0 else graph._core.live_before(axis, position, keep)

        self._old = _partial_slices(graph.recording, shapes, moved)
        self._new = _partial_slices(new, new.shapes, lambda tensor, dim, position: position)
        self._done = [0, 0]

    def difference(self, old_op: int, new_op: int) -> str:
        """Compares the slices since the last call, up to these operators."""
        was = [what for op, what in self._old if self._done[0] <= op < old_op]
        now = [what for op, what in self._new if self._done[1] <= op < new_op]
        self._done = [old_op, new_op]
        if was == now:
            return ""
        return f"is fed by slices (dim, start, length) {now} where {was} are predicted"


def _partial_slices(
    recording: Recording, shapes: list[tuple], moved: Callable[[int, int, int], int]
) -> list[tuple[int, tuple[int, int, int]]]:
    """(call, (dim, start, length)) of every slice that takes less than the whole dim."""
    found = []
    for op, call in enumerate(recording.calls):
        name = base_name(call.name)
        if name not in ("slice", "narrow", "select"):
            continue
        source, out = int(call.args[0]), call.outs[0]
        dim = call.args[1] % len(shapes[source])
        size = recording.shapes[source][dim]
        start = call.args[2] or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        length = 1 if name == "select" else shapes[out][dim]
        if name == "select" or length != shapes[source][dim]:
            found.append((op, (dim, moved(source, dim, start), length)))
    return found


def _first_failed(graph: ChannelGraph, error: TraceError) -> int:
    """The forward raised before an operator: the one after the last that ran."""
    return min(error.calls_done, len(graph.recording.calls) - 1)


def _failure(graph: ChannelGraph, shapes: list[tuple], op: int, problem: str) -> CompactionError:
    calls = graph.recording.calls
    groups: set[int] = set()
    # A size may come from an operator before, and Python code that checks sizes stops before its operator: look ever
    # further back, then ahead.
    for back, ahead in ((0, 0), (1, 0), (2, 0), (4, 0), (4, 2), (16, 4), (len(calls), 0)):
        for call in calls[max(0, op - back) : op + 1 + ahead]:
            for position in (*call.outs, *_record.refs_in(call.args)):
                groups.update(graph._core.groups_of(position))
        groups = {g for g in groups if graph.groups[g].reason is None and _is_cut(graph, g, shapes)}
        if groups:
            break
    reason = f"its size is fixed in the forward: {calls[op]} {problem}"
    names = ", ".join(graph.groups[g].name for g in sorted(groups)) or "unknown"
    return CompactionError(
        f"compact: the smaller network does not run as predicted: {calls[op]} {problem}. Groups involved: {names}. "
        "The model is unchanged; keep those groups (`graph.protect`) and select again.",
        tuple(sorted(groups)),
        reason,
    )


def _is_cut(graph: ChannelGraph, group: int, shapes: list[tuple]) -> bool:
    name = graph._core.groups[group]
    return shapes[name.slot][name.dim] < graph.recording.shapes[name.slot][name.dim]
