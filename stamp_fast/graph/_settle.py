"""Mends what a smaller network trips over, so that a working one always comes out (DESIGN 3.4).

A random cut is replayed on meta tensors. At a mismatch, in this order: a module attribute that holds a size is bound
to the width it comes from; two dims that the forward takes for equally wide are tied; the group at fault is kept,
found by bisection. A mend is accepted only if the replay gets further with it, and is then tried on the other modules
of the same class.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..errors import CompactionError
from . import _plan, _record, _replay
from ._replay import Mismatch
from ._undisturbed import named_modules

if TYPE_CHECKING:
    from .graph import ChannelGraph

_PROBES = 3  # cuts that have to run as predicted, one after the other
_TRIES = 6  # attributes tried per mismatch, the nearest first
_TIES = 3  # ties tried together with attributes
_SUSPECTS = 4  # groups near a mismatch that are tried before all are bisected
_SPLITS = 16  # calls around the mismatch whose splits are tried the other way
_REACH = 40  # calls before and after the mismatch whose sizes are candidates
_INSIDE = 200  # calls of the module at fault whose sizes are candidates too


@dataclasses.dataclass(frozen=True)
class Binding:
    """An int attribute of a module, or one item of a list attribute, that holds the width of a recorded tensor's dim.

    Attributes:
        times: the attribute is that many times the width of the dim.
    """

    module: str
    attribute: str
    item: int | None
    tensor: int
    dim: int
    times: int = 1


@dataclasses.dataclass(frozen=True)
class Tie:
    """Two dims of recorded tensors whose positions live or die together, because the forward wants equal counts."""

    first: tuple[int, int]
    second: tuple[int, int]


def settle(graph: ChannelGraph) -> None:
    """See `ChannelGraph.settle`."""
    seed = 0
    while seed < _PROBES:
        keep = _probe(graph, seed)
        found = _replay.compare(graph, graph.plan(keep))
        if found is None:
            seed += 1
        elif not (_bind(graph, keep, found) or _tie(graph, keep, found) or _resplit(graph, seed, found)):
            _keep_culprit(graph, keep, found)


def _probe(graph: ChannelGraph, seed: int) -> torch.Tensor:
    """A random cut of every group that hides no fixed size.

    Equal counts would hide a size that is taken from the wrong group, and a divisor of the width one that a view with
    an open dim absorbs.
    """
    generator = torch.Generator().manual_seed(seed)
    keep = graph.all_kept()
    taken: dict[int, set[int]] = {}
    for index, group in enumerate(graph.groups):
        size = group.num_classes
        # Far from the neighbour's, and from its own in the other probes.
        wanted = size * (0.15 + 0.7 * ((0.618 * index + 0.37 * seed) % 1))
        order = torch.randperm(size, generator=generator)
        if group.reason is not None or size < 2:
            continue
        used = taken.setdefault(size, set())

        # A single channel left takes shortcuts that say nothing of other counts.
        least = 2 if size > 3 else 1
        counts = [c for c in range(least, size) if math.gcd(c, size) == 1]
        if len(counts) < _PROBES:  # another count in every probe matters more
            counts = list(range(least, size))
        free = [c for c in counts if c not in used] or counts
        count = min(free, key=lambda c: abs(c - wanted))  # noqa: B023  (used at once)
        used.add(count)
        keep[group.classes.start + order[count:]] = False
    return keep


def _reach(graph: ChannelGraph, keep: torch.Tensor) -> tuple[float, float]:
    found = _replay.compare(graph, graph.plan(keep))
    return (math.inf, math.inf) if found is None else found.progress


# --- attributes that hold a size --------------------------------------------------------------------------------------
def _bind(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> bool:
    if _bind_pieces(graph, keep, found):
        return True
    before = graph.bindings
    for candidate in itertools.islice(_bindings(graph, keep, found), _TRIES):
        graph.bindings = _with(before, candidate)
        reached = _reach(graph, keep)
        if reached > found.progress:
            graph.bindings = _with(before, _everywhere(graph, candidate))
            if _reach(graph, keep) < reached:
                graph.bindings = _with(before, candidate)
            return True
    graph.bindings = before
    return False


def _with(bindings: list[Binding], new: list[Binding]) -> list[Binding]:
    """An attribute that was bound to the wrong one of two equal widths is bound anew."""
    again = {(b.module, b.attribute, b.item) for b in new}
    return [b for b in bindings if (b.module, b.attribute, b.item) not in again] + new


def _bindings(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> Iterator[list[Binding]]:
    shapes = graph._core.shapes(graph._bytes(keep))
    bound = {(b.module, b.attribute, b.item, b.times * shapes[b.tensor][b.dim]) for b in graph.bindings}
    sizes = _changed_sizes(graph, keep, found)
    for times in (1, 2, 3, 4):
        for name in found.modules:
            for attribute, value in _int_attributes(graph.model.get_submodule(name)):
                if isinstance(value, int):
                    for tensor, dim, size in sizes:
                        now = times * shapes[tensor][dim]
                        if value == times * size and (name, attribute, None, now) not in bound:
                            yield [Binding(name, attribute, None, tensor, dim, times)]
                elif times == 1 and not any(b[:3] == (name, attribute, 0) for b in bound):
                    for call in _calls_near(graph, found):
                        pieces = _pieces(graph, call, name, attribute, value)
                        if pieces:
                            yield pieces
                    for tensor, dim, size in sizes:
                        if size in value:
                            yield [Binding(name, attribute, value.index(size), tensor, dim)]


def _pieces(graph: ChannelGraph, call: _record.Call, name: str, attribute: str, value: list | tuple) -> list[Binding]:
    """Where a list attribute holds the sizes of all pieces that the call makes: one binding for each."""
    shapes = [graph.recording.shapes[t] for t in call.outs]
    for dim in range(min(map(len, shapes)) if len(shapes) == len(value) > 1 else 0):
        if [shape[dim] for shape in shapes] == list(value):
            return [Binding(name, attribute, i, t, dim) for i, t in enumerate(call.outs)]
    return []


def _bind_pieces(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> bool:
    """Sizes of the pieces of a split in int attributes: bound all at once, because no piece fits before all do. Pieces
    that share an attribute are tied.
    """
    before = graph.bindings
    bound = {(b.module, b.attribute) for b in before}
    for call in _calls_near(graph, found):
        if len(call.outs) < 2 or "split_with_sizes" not in call.name:
            continue
        bindings = [b for b in _piece_attributes(graph, call, found) if (b.module, b.attribute) not in bound]
        ties, level = [], keep
        for binding in bindings:
            for other in call.outs:
                tie = Tie((binding.tensor, binding.dim), (other, binding.dim))
                if other != binding.tensor and _size(graph, tie.first) == _size(graph, tie.second):
                    levelled = _levelled(graph, level, tie)
                    if levelled is not None:
                        ties.append(tie)
                        level = levelled
        graph.bindings = before + bindings
        reached = _reach(graph, level) if bindings else found.progress
        if reached > found.progress:
            graph.bindings = before + _everywhere(graph, bindings)
            tied = [t for tie in ties for t in _tied_everywhere(graph, tie, found)]
            if tied:
                graph.rebuild(graph.ties + tied)
            elif _reach(graph, level) < reached:
                graph.bindings = before + bindings
            return True
    graph.bindings = before
    return False


def _piece_attributes(graph: ChannelGraph, call: _record.Call, found: Mismatch) -> list[Binding]:
    """Where int attributes hold the sizes of the pieces that the call makes: one binding for each attribute."""
    dim = call.args[2] % len(graph.recording.shapes[call.outs[0]])
    pieces: dict[int, list[int]] = {}
    for tensor in call.outs:
        pieces.setdefault(graph.recording.shapes[tensor][dim], []).append(tensor)
    bindings = []
    for name in found.modules:
        for attribute, value in _int_attributes(graph.model.get_submodule(name)):
            if isinstance(value, int) and pieces.get(value):
                # Attributes of one value are taken for the pieces in their order.
                piece = pieces[value].pop(0) if len(pieces[value]) > 1 else pieces[value][0]
                bindings.append(Binding(name, attribute, None, piece, dim))
    return bindings


def _int_attributes(module: nn.Module) -> Iterator[tuple[str, int | list | tuple]]:
    known = _plan.known_widths(module)
    for attribute, value in vars(module).items():
        if attribute.startswith("_") or attribute in known or isinstance(value, bool):
            continue
        is_list = type(value) in (list, tuple) and value and all(type(v) is int for v in value)
        if isinstance(value, int) or is_list:
            yield attribute, value


def _everywhere(graph: ChannelGraph, bindings: list[Binding]) -> list[Binding]:
    """The same bindings on every module of the same class, where its attribute has the value."""
    result = list(bindings)
    whole_list = len(bindings) > 1 and bindings[0].item is not None
    for binding in bindings[:1] if whole_list else bindings:
        for name, call, (tensor, dim) in _analogues(graph, binding.module, (binding.tensor, binding.dim)):
            value = getattr(graph.model.get_submodule(name), binding.attribute, None)
            if whole_list:
                if isinstance(value, (list, tuple)):
                    result += _pieces(graph, call, name, binding.attribute, value)
                continue
            if binding.item is not None:
                has_item = isinstance(value, (list, tuple)) and len(value) > binding.item
                value = value[binding.item] if has_item else None
            if value == binding.times * _size(graph, (tensor, dim)):
                result.append(dataclasses.replace(binding, module=name, tensor=tensor, dim=dim))
    return result


# --- counts that have to be equal -------------------------------------------------------------------------------------
def _tie(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> bool:
    """Ties two dims, alone or together with an attribute that is bound: an attention that takes `width // heads` of a
    residual stream for the width of a head runs only with both.
    """
    levels = [(tie, level) for tie in _ties(graph, keep, found) if (level := _levelled(graph, keep, tie)) is not None]
    for tie, level in levels:
        if _reach(graph, level) > found.progress:
            graph.rebuild([*graph.ties, *_tied_everywhere(graph, tie, found)])
            return True
    before = graph.bindings
    for tie, level in levels[:_TIES]:
        for candidate in itertools.islice(_bindings(graph, level, found), _TRIES):
            graph.bindings = _with(before, candidate)
            if _reach(graph, level) > found.progress:
                graph.bindings = _with(before, _everywhere(graph, candidate))
                graph.rebuild([*graph.ties, *_tied_everywhere(graph, tie, found)])
                return True
        graph.bindings = before
    return False


def _ties(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> list[Tie]:
    """Pairs of dims near the mismatch that are equally wide in the dense network but not in the smaller one."""
    first: dict[tuple[int, int, bool], tuple[int, int]] = {}
    seen: set[int] = set()
    for tensor, dim, size, left in _changed_dims(graph, keep, found):
        axis = graph._core.axis_of(tensor, dim)
        if axis not in seen:
            seen.add(axis)
            first.setdefault((size, left, _in_runs(graph, (tensor, dim))), (tensor, dim))
    # Where heads are folded into the batch, that dim may happen to be as wide as a residual stream: last.
    places = sorted(first.items(), key=lambda item: not item[0][2])
    return [
        Tie(other, place)
        for i, ((size, left, _), place) in enumerate(places)
        for (other_size, other_left, _), other in places[:i]
        if size == other_size and left != other_left
    ]


def _in_runs(graph: ChannelGraph, place: tuple[int, int]) -> bool:
    """Whether positions of one class are next to each other."""
    classes = _classes(graph, place)
    return len(classes.unique_consecutive()) == len(classes.unique())


def _levelled(graph: ChannelGraph, keep: torch.Tensor, tie: Tie) -> torch.Tensor | None:
    """The same cut, but with the positions left in one dim that are left in the other; None where that is not all that
    a tie would mean.
    """
    if not _can_tie(graph, tie):
        return None
    # Heads, say, of many positions each: the other dim goes by whole heads too. What comes later follows what comes
    # first, which others before the mismatch may follow already.
    axes = [_classes(graph, place) for place in (tie.first, tie.second)]
    coarse, fine = sorted(axes, key=lambda classes: (len(classes.unique()), int(classes[0])))
    level = keep.clone()
    level[fine] = keep[coarse]
    if any(graph.groups[g].reason for place in (tie.first, tie.second) for g in graph._core.groups_of(*place)):
        level[fine] = level[coarse] = True
    return level if torch.equal(level[fine], level[coarse]) else None


def _can_tie(graph: ChannelGraph, tie: Tie) -> bool:
    """Two dims of a group each, that as one would have more than one class."""
    groups = [graph._core.groups_of(*place) for place in (tie.first, tie.second)]
    if any(len(found) != 1 for found in groups) or groups[0] == groups[1]:
        return False
    classes = [_classes(graph, place).unique() for place in (tie.first, tie.second)]
    return all(len(found) > 1 and found[0] >= 0 for found in classes)


def _classes(graph: ChannelGraph, place: tuple[int, int]) -> torch.Tensor:
    """Class of every position of a dim; -1 where it never goes."""
    return torch.from_numpy(graph._core.axis_classes(graph._core.axis_of(*place)))


def _tied_everywhere(graph: ChannelGraph, tie: Tie, found: Mismatch) -> list[Tie]:
    result = [tie]
    for name in _at_fault(graph, found):
        seconds = {other: place for other, _, place in _analogues(graph, name, tie.second)}
        for other, _, first in _analogues(graph, name, tie.first):
            if other in seconds and _size(graph, first) == _size(graph, seconds[other]):
                alike = Tie(first, seconds[other])
                if _can_tie(graph, alike):
                    result.append(alike)
    return result


# --- which axis survives a split --------------------------------------------------------------------------------------
def _resplit(graph: ChannelGraph, seed: int, found: Mismatch) -> bool:
    """Heads or the width of a head, rows or columns of a shuffle: lets the other axis survive."""
    before = dict(graph.survivors)
    chosen, candidates = graph._core.survivors, graph._core.candidates
    near = sorted((abs(op - found.op), op) for op in candidates if op not in before)
    for _, op in [(distance, op) for distance, op in near if distance <= _SPLITS]:
        for axis in candidates[op]:
            if axis == chosen[op]:
                continue
            everywhere = dict.fromkeys(_same_operators(graph, op, found), axis)
            classes = graph.num_classes
            graph.rebuild(graph.ties, before | everywhere)
            # Half as many classes would buy the cut of one group with the freedom of others.
            if 2 * graph.num_classes > classes and _reach(graph, _probe(graph, seed)) > found.progress:
                return True
            graph.rebuild(graph.ties, before)
    return False


def _same_operators(graph: ChannelGraph, op: int, found: Mismatch) -> Iterator[int]:
    """The operator, and those in its place in other modules of the class of the module at fault."""
    yield op
    call = graph.recording.calls[op]
    index = {id(c): i for i, c in enumerate(graph.recording.calls)}
    for name in _at_fault(graph, found):
        for _, other, _ in _analogues(graph, name, (call.outs[0], 0)):
            yield index[id(other)]


# --- keeping ----------------------------------------------------------------------------------------------------------
def _keep_culprit(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> None:
    """Keeps the group whose cut alone brings the mismatch about, and its like in other modules. Failing that, the one
    with which the first k groups fail while the first k - 1 work.
    """
    cut = graph.cut_groups(keep)

    def failed(groups: list[int]) -> Mismatch | None:
        return _replay.compare(graph, graph.plan(graph.cut_only(keep, groups)))

    near = dict.fromkeys(g for call in _calls_near(graph, found) for g in graph.cut_groups_at(call, keep))
    culprit = next((g for g in itertools.islice(near, _SUSPECTS) if failed([g])), None)
    if culprit is None and cut:
        first = bisect.bisect_left(range(1, len(cut)), True, key=lambda k: failed(cut[:k]) is not None)
        culprit = cut[first]
        found = failed(cut[: first + 1]) or found
    if culprit is None:
        raise CompactionError(
            "settle: with every channel kept the forward still does not repeat itself: "
            f"{graph.recording.calls[found.op]} {found.problem}. It has to run the same operators every time."
        )
    groups = {g for g in (culprit, *_like(graph, culprit, found)) if graph.groups[g].reason is None}
    graph.keep_groups(groups, f"its size is fixed in the forward: {graph.recording.calls[found.op]} {found.problem}")


def _like(graph: ChannelGraph, group: int, found: Mismatch) -> Iterator[int]:
    """What is in the place of the group in the other modules of the class of the module at fault."""
    for name in _at_fault(graph, found):
        for call in _calls_of(graph, name):
            for tensor in _tensors(call):
                for dim in range(len(graph.recording.shapes[tensor])):
                    if graph._core.groups_of(tensor, dim) == [group]:
                        for _, _, place in _analogues(graph, name, (tensor, dim)):
                            yield from graph._core.groups_of(*place)
                        return


def _at_fault(graph: ChannelGraph, found: Mismatch) -> list[str]:
    """The innermost running module of a class that is not torch's, if any: what it does, others of its class do too."""
    classes = ((name, type(graph.model.get_submodule(name))) for name in found.modules)
    return [name for name, kind in classes if not kind.__module__.startswith("torch.")][:1]


# --- places in the recording ------------------------------------------------------------------------------------------
def _calls_near(graph: ChannelGraph, found: Mismatch) -> list[_record.Call]:
    """Calls around the mismatch, the nearest first; of two equally near the one before it. Then the other calls of the
    module at fault.
    """
    calls = graph.recording.calls
    near = range(max(0, found.op - _REACH + 1), min(len(calls), found.op + _REACH))
    nearest = [calls[i] for i in sorted(near, key=lambda i: abs(i - found.op))]
    known = set(map(id, nearest))
    inside = [call for name in _at_fault(graph, found) if name for call in _calls_of(graph, name)]
    return nearest + [call for call in inside[:_INSIDE] if id(call) not in known]


def _changed_dims(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> Iterator[tuple[int, int, int, int]]:
    """(tensor, dim, dense size, size in the cut) of the dims near the mismatch that shrink, the nearest first."""
    shapes = graph._core.shapes(graph._bytes(keep))
    for tensor in dict.fromkeys(t for call in _calls_near(graph, found) for t in (*call.outs, *_record.refs_in(call.args))):
        for dim, size in enumerate(graph.recording.shapes[tensor]):
            if size != shapes[tensor][dim]:
                yield tensor, dim, size, shapes[tensor][dim]


def _changed_sizes(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> list[tuple[int, int, int]]:
    """(tensor, dim, dense size) of such dims, one for each pair of sizes: the probe cuts every group by another
    fraction, so that equal pairs of sizes are the same channels.
    """
    first: dict[tuple[int, int], tuple[int, int, int]] = {}
    for tensor, dim, size, left in _changed_dims(graph, keep, found):
        first.setdefault((size, left), (tensor, dim, size))
    return list(first.values())


def _size(graph: ChannelGraph, place: tuple[int, int]) -> int:
    return graph.recording.shapes[place[0]][place[1]]


def _of_same_class(graph: ChannelGraph, name: str) -> list[str]:
    kind = type(graph.model.get_submodule(name))
    return [other for other, module in named_modules(graph.model).items() if type(module) is kind and other != name]


def _analogues(
    graph: ChannelGraph, name: str, place: tuple[int, int]
) -> Iterator[tuple[str, _record.Call, tuple[int, int]]]:
    """(module, call, (tensor, dim)): the same place in the calls of every other module of the class of `name`."""
    tensor, dim = place
    call = next((c for c in _calls_of(graph, name) if tensor in _tensors(c)), None)
    if call is None:
        return
    ordinal, position = _alike(graph, name, call).index(call), _tensors(call).index(tensor)
    for other in _of_same_class(graph, name):
        theirs = _alike(graph, other, call)[ordinal : ordinal + 1]
        tensors = _tensors(theirs[0]) if theirs else []
        if position < len(tensors) and dim < len(graph.recording.shapes[tensors[position]]):
            yield other, theirs[0], (tensors[position], dim)


def _alike(graph: ChannelGraph, name: str, call: _record.Call) -> list[_record.Call]:
    """Calls of the same operator in the same line, made by a module: others around them may be left out in some."""
    return [c for c in _calls_of(graph, name) if c.name == call.name and c.line == call.line]


def _calls_of(graph: ChannelGraph, name: str) -> list[_record.Call]:
    if graph.calls_by_module is None:
        graph.calls_by_module = {}
        for call in graph.recording.calls:
            parts = call.module.split(".")
            for end in range(len(parts), 0, -1):
                graph.calls_by_module.setdefault(".".join(parts[:end]), []).append(call)
    return graph.recording.calls if not name else graph.calls_by_module.get(name, [])


def _tensors(call: _record.Call) -> list[int]:
    return [*_record.refs_in(call.args), *call.outs]
