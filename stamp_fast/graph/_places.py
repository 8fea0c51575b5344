"""Where in a recording a mismatch can come from, and the same place in other modules of a class."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from . import _record
from ._replay import Mismatch
from ._undisturbed import named_modules

if TYPE_CHECKING:
    import torch

    from .graph import ChannelGraph

Place = tuple[int, int]  # a recorded tensor and one of its dims

_REACH = 40  # calls before and after the mismatch whose sizes are candidates
_INSIDE = 200  # calls of the module at fault whose sizes are candidates too


def at_fault(graph: ChannelGraph, found: Mismatch) -> list[str]:
    """The innermost running module of a class that is not torch's, if any: what it does, others of its class do too."""
    classes = ((name, type(graph.model.get_submodule(name))) for name in found.modules)
    return [name for name, kind in classes if not kind.__module__.startswith("torch.")][:1]


def calls_near(graph: ChannelGraph, found: Mismatch) -> list[_record.Call]:
    """Calls around the mismatch, the nearest first; of two equally near the one before it. Then the other calls of the
    module at fault.
    """
    calls = graph.recording.calls
    near = range(max(0, found.op - _REACH + 1), min(len(calls), found.op + _REACH))
    nearest = [calls[i] for i in sorted(near, key=lambda i: abs(i - found.op))]
    known = set(map(id, nearest))
    inside = [call for name in at_fault(graph, found) if name for call in calls_of(graph, name)]
    return nearest + [call for call in inside[:_INSIDE] if id(call) not in known]


def changed_dims(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, dim, dense size, size in the cut) of the dims near the mismatch that shrink, the nearest first."""
    shapes = graph._core.shapes(graph._bytes(keep))
    for tensor in dict.fromkeys(
        t for call in calls_near(graph, found) for t in (*call.outs, *_record.refs_in(call.args))
    ):
        for dim, size in enumerate(graph.recording.shapes[tensor]):
            if size != shapes[tensor][dim]:
                yield tensor, dim, size, shapes[tensor][dim]


def changed_sizes(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> list[tuple[int, int, int]]:
    """(tensor, dim, dense size) of such dims, one for each pair of sizes: the probe cuts every group by another
    fraction, so that equal pairs of sizes are the same channels.
    """
    first: dict[tuple[int, int], tuple[int, int, int]] = {}
    for tensor, dim, size, left in changed_dims(graph, keep, found):
        first.setdefault((size, left), (tensor, dim, size))
    return list(first.values())


def size_of(graph: ChannelGraph, place: Place) -> int:
    return graph.recording.shapes[place[0]][place[1]]


def _of_same_class(graph: ChannelGraph, name: str) -> list[str]:
    kind = type(graph.model.get_submodule(name))
    return [other for other, module in named_modules(graph.model).items() if type(module) is kind and other != name]


def analogues(graph: ChannelGraph, name: str, place: Place) -> Iterator[tuple[str, _record.Call, Place]]:
    """(module, call, (tensor, dim)): the same place in the calls of every other module of the class of `name`."""
    tensor, dim = place
    call = next((c for c in calls_of(graph, name) if tensor in tensors_of(c)), None)
    if call is None:
        return
    ordinal, position = alike_in(graph, name, call).index(call), tensors_of(call).index(tensor)
    for other in _of_same_class(graph, name):
        theirs = alike_in(graph, other, call)[ordinal : ordinal + 1]
        tensors = tensors_of(theirs[0]) if theirs else []
        if position < len(tensors) and dim < len(graph.recording.shapes[tensors[position]]):
            yield other, theirs[0], (tensors[position], dim)


def alike_in(graph: ChannelGraph, name: str, call: _record.Call) -> list[_record.Call]:
    """Calls of the same operator in the same line, made by a module: others around them may be left out in some."""
    return [c for c in calls_of(graph, name) if c.name == call.name and c.line == call.line]


def calls_of(graph: ChannelGraph, name: str) -> list[_record.Call]:
    if graph.calls_by_module is None:
        graph.calls_by_module = {}
        for call in graph.recording.calls:
            parts = call.module.split(".")
            for end in range(len(parts), 0, -1):
                graph.calls_by_module.setdefault(".".join(parts[:end]), []).append(call)
    return graph.recording.calls if not name else graph.calls_by_module.get(name, [])


def tensors_of(call: _record.Call) -> list[int]:
    return [*_record.refs_in(call.args), *call.outs]
