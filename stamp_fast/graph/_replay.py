"""Runs the smaller network on meta tensors and compares every operator with what the labels predict."""

from __future__ import annotations

import dataclasses
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

_SLICES = frozenset(("slice", "narrow", "select"))
_TELLING = _SLICES | {"view", "_unsafe_view", "_reshape_alias"}
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


@dataclasses.dataclass
class Mismatch:
    """The first operator of a smaller network that is not what the labels predict.

    Attributes:
        op: index of the recorded call.
        progress: grows along the forward; tells which of two mismatches comes later.
        problem: what is different.
        modules: names of the modules whose forwards were running, the innermost first.
    """

    op: int
    progress: tuple[int, int]
    problem: str
    modules: tuple[str, ...]


class _Stop(BaseException):
    # Not an Exception: forwards may catch those.
    def __init__(self, why: Mismatch | Exception) -> None:
        self.why = why


def compare(graph: ChannelGraph, plan: _plan.Plan) -> Mismatch | None:
    """Replays the network that the plan makes, up to the first mismatch. Changes nothing."""
    found = _replayed(graph, plan)
    return found if isinstance(found, Mismatch) else None


def _replayed(graph: ChannelGraph, plan: _plan.Plan) -> Recording | Mismatch:
    small = {}
    for i, slot in enumerate(graph.slots):
        # All of them, or an operator that the recorder does not see meets tensors on two devices.
        tensor = torch.empty(plan.shape(i), dtype=slot.tensor.dtype, device="meta")
        small[i] = nn.Parameter(tensor, requires_grad=slot.tensor.requires_grad) if slot.is_parameter else tensor
    comparison = _Comparison(graph, plan)
    try:
        with _plan.swapped(plan, small):
            recording = _record.record(graph.model, graph.example, comparison.watch)
    except _Stop as stop:
        if isinstance(stop.why, Exception):
            raise stop.why from None
        return stop.why
    except TraceError as error:
        return comparison.raised(error)
    return comparison.ended() or recording


def check(graph: ChannelGraph, plan: _plan.Plan) -> Recording:
    """The recording of the smaller network. Changes nothing.

    Raises:
        CompactionError: at the first operator that differs from the prediction.
    """
    found = _replayed(graph, plan)
    if isinstance(found, Mismatch):
        raise _failure(graph, plan, found)
    return found


class _Comparison:
    """Follows a replay operator by operator, in step with the recording of the dense network."""

    def __init__(self, graph: ChannelGraph, plan: _plan.Plan) -> None:
        keep = graph._bytes(plan.keep)
        self.old = graph.recording
        self.shapes = graph._core.shapes(keep)
        self.derived = {(op, arg): value for op, arg, value in graph._core.scalar_args(keep)}
        self.expected = [i for i, call in enumerate(self.old.calls) if base_name(call.name) not in VIEWS]
        self.views_of_old = dict(_telling_views(self.old, self.shapes, lambda *where: _moved(graph, keep, *where)))
        self.done = 0  # operators that are no views
        self.views = 0  # since the last of those
        self.views_of_new: list[tuple] = []
        self.waits_for_add = False

    def _at(self) -> int:
        return self.expected[min(self.done, len(self.expected) - 1)] if self.expected else 0

    def _mismatch(self, problem: str, modules: tuple[str, ...], op: int | None = None) -> Mismatch:
        op = self._at() if op is None else op
        return Mismatch(op, (self.done, self.views), problem, modules)

    def watch(self, new: Recording, call: Call, running: list[str]) -> None:
        name = base_name(call.name)
        if name in VIEWS:
            self.views += 1
            if name in _TELLING:
                self.views_of_new += [what for _, what in _telling_views(new, new.shapes, _unmoved, [call])]
            return
        if self.waits_for_add and name == "add":
            self.waits_for_add = False
            return
        if self.done == len(self.expected):
            problem = f"is followed by {call.name}, which the dense network does not run"
            raise _Stop(self._mismatch(problem, tuple(reversed(running))))
        at = self._at()
        try:
            was, call, took = self._paired(at, call)
            problem = _difference(at, was, call, self.old, new, self.shapes, self.derived)
        except Exception as error:  # ours: not to be taken for one of the forward's
            raise _Stop(error) from error
        problem = problem or self._views_difference(at)
        if problem:
            raise _Stop(self._mismatch(problem, tuple(reversed(running)), at))
        self.done += took
        self.views = 0

    def _paired(self, at: int, call: Call) -> tuple[Call, Call, int]:
        """The recorded call and the new one in comparable form, and how many recorded calls that takes.

        A linear layer is addmm, or mm and add, as the layout of its input has it.
        """
        was = self.old.calls[at]
        names = base_name(was.name), base_name(call.name)
        if names == ("addmm", "mm"):
            self.waits_for_add = True
            return dataclasses.replace(was, name=call.name, args=was.args[1:3]), call, 1
        follows = self.expected[self.done + 1 : self.done + 2]
        if names == ("mm", "addmm") and follows and base_name(self.old.calls[follows[0]].name) == "add":
            return was, dataclasses.replace(call, name=was.name, args=call.args[1:3]), 2
        return was, call, 1

    def _views_difference(self, at: int) -> str:
        """Compares slices and reshapes since the last operator: offsets and foldings show nowhere else."""
        first = self.expected[self.done - 1] if self.done else -1
        was = [self.views_of_old[op] for op in range(first + 1, at) if op in self.views_of_old]
        now, self.views_of_new = self.views_of_new, []
        if was == now:
            return ""
        return f"is fed by views {now} where {was} are predicted"

    def raised(self, error: TraceError) -> Mismatch:
        """The forward failed before an operator: that is the one after the last that ran."""
        op = self.expected[self.done - 1] + 1 + self.views if self.done else self.views
        return self._mismatch(
            str(error.__cause__ or error), error.modules, min(op, self._at(), len(self.old.calls) - 1)
        )

    def ended(self) -> Mismatch | None:
        if self.done == len(self.expected):
            return None
        return self._mismatch(f"is not run: {self.done} operators instead of {len(self.expected)}", ())


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
    if isinstance(a, torch.device):  # of a parameter: those that shrink are on meta in a replay
        return ""
    return "" if a == b or (a != a and b != b) else f"is {b} where {a} is predicted"


def _unmoved(tensor: int, dim: int, position: int) -> int:
    return position


def _moved(graph: ChannelGraph, keep: Any, tensor: int, dim: int, position: int) -> int:
    axis = graph._core.axis_of(tensor, dim)
    return position if axis < 0 else graph._core.live_before(axis, position, keep)


def _telling_views(
    recording: Recording,
    shapes: list[tuple],
    moved: Callable[[int, int, int], int],
    calls: list[Call] | None = None,
) -> list[tuple[int, tuple]]:
    """(call, (dim, start, length)) of slices of less than the whole dim, (call, (shape, new shape)) of reshapes."""
    found: list[tuple[int, tuple]] = []
    for op, call in enumerate(recording.calls if calls is None else calls):
        name = base_name(call.name)
        if name not in _TELLING:
            continue
        source, out = int(call.args[0]), call.outs[0]
        if name not in _SLICES:
            # Dims of 1 come and go; what an operator says of them is compared with its shapes.
            fold = [tuple(size for size in shapes[t] if size != 1) for t in (source, out)]
            if fold[0] != fold[1]:
                found.append((op, (fold[0], fold[1])))
            continue
        dim = call.args[1] % len(shapes[source])
        size = recording.shapes[source][dim]
        start = call.args[2] or 0
        start = min(max(start + size if start < 0 else start, 0), size)
        length = 1 if name == "select" else shapes[out][dim]
        if name == "select" or length != shapes[source][dim]:
            found.append((op, (dim, moved(source, dim, start), length)))
    return found


def _failure(graph: ChannelGraph, plan: _plan.Plan, found: Mismatch) -> CompactionError:
    calls = graph.recording.calls
    groups: set[int] = set()
    # A size may come from an operator before, and Python code that checks sizes stops before its operator: look ever
    # further back, then ahead.
    for back, ahead in ((0, 0), (1, 0), (2, 0), (4, 0), (4, 2), (16, 4), (len(calls), 0)):
        for call in calls[max(0, found.op - back) : found.op + 1 + ahead]:
            groups.update(graph.cut_groups_at(call, plan.keep))
        if groups:
            break
    names = ", ".join(graph.groups[g].name for g in sorted(groups)) or "unknown"
    call = calls[found.op] if calls else "forward"
    return CompactionError(
        f"compact: the smaller network does not run as predicted: {call} {found.problem}. Groups involved: {names}. "
        "The model is unchanged; let `graph.settle()` mend it before you select, or keep those groups with "
        "`graph.protect`.",
        tuple(sorted(groups)),
        f"its size is fixed in the forward: {call} {found.problem}",
    )
