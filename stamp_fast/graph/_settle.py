"""Mends what a smaller network trips over, so that a working one always comes out.

A random cut is replayed on meta tensors. At a mismatch, in this order: a module attribute that holds a size is bound
to the width it comes from; two dims that the forward takes for equally wide are tied, alone or together with such an
attribute; the group at fault is kept, found by bisection. A mend is accepted only if the replay gets further with it,
and is then tried on the other modules of the same class.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..errors import CompactionError
from . import _bindings, _plan, _replay, _ties
from ._bindings import Binding
from ._places import alike_in, analogues, at_fault, calls_near, calls_of, size_of, tensors_of
from ._replay import Mismatch
from ._ties import Tie

if TYPE_CHECKING:
    from .graph import ChannelGraph

_PROBES = 3  # cuts that have to run as predicted, one after the other
_TRIES = 6  # attributes tried per mismatch, and ties, the nearest first
_PAIRS = 3  # ties tried together with attributes
_SUSPECTS = 4  # groups near a mismatch that are tried before all are bisected
_SPLITS = 16  # calls around the mismatch whose splits are tried the other way


@dataclasses.dataclass
class _Trial:
    """What is known at a mismatch, for all mends that are tried there.

    Attributes:
        plan: of the cut that brings it about.
        idle: attributes that changed nothing at a place in the code, and bindings that made it worse there.
        after: what a mend that keeps the groups as they are has made of the same cut, if it was replayed.
    """

    graph: ChannelGraph
    plan: _plan.Plan
    found: Mismatch
    idle: set[tuple]
    after: list[Mismatch | None] = dataclasses.field(default_factory=list)

    @property
    def keep(self) -> torch.Tensor:
        return self.plan.keep

    def replay(self, plan: _plan.Plan | None = None) -> Mismatch | None:
        """The first mismatch with the attributes that are bound now."""
        return _replay.compare(self.graph, _plan.bound_anew(plan or self.plan))

    def is_further(self, then: Mismatch | None) -> bool:
        return _progress(then) > self.found.progress

    def tells(self, then: Mismatch | None) -> bool:
        """Whether a mend makes a difference to the mismatch, though not enough of one. As far as the problem tells:
        where there is no size in it, a mend may.
        """
        if then is None or then.progress != self.found.progress:
            return False
        return then.problem != self.found.problem or not any(map(str.isdigit, then.problem))

    def key(self, bindings: list[Binding]) -> tuple:
        kind = type(self.graph.model.get_submodule(bindings[0].module))
        return kind, bindings[0].attribute, bindings[0].item, self.place

    @functools.cached_property
    def place(self) -> tuple:
        """Where in the code the mismatch is and of what kind: the same for all modules of a class."""
        call = self.graph.recording.calls[self.found.op]
        alike = next(
            (found for name in self.found.modules[:1] if call in (found := alike_in(self.graph, name, call))), []
        )
        problem = re.sub(r"\d+", "", self.found.problem)
        return problem, call.name, call.line, alike.index(call) if alike else self.found.op


def settle(graph: ChannelGraph) -> None:
    """See `ChannelGraph.settle`."""
    seed = 0
    idle: set[tuple] = set()
    trial = None
    while seed < _PROBES:
        if trial is not None and trial.after:
            plan, found = trial.plan, trial.after[-1]
        else:
            plan = graph.plan(_probe(graph, seed))
            found = _replay.compare(graph, plan)
        trial = None
        if found is None:
            seed += 1
            continue
        trial = _Trial(graph, plan, found, idle)
        telling: list[list[Binding]] = []
        if not (_bind_pieces(trial) or _bind(trial, telling) or _tie(trial, telling) or _resplit(trial, seed)):
            _keep_culprit(graph, plan.keep, found)


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


def _progress(found: Mismatch | None) -> tuple[float, float]:
    return (math.inf, math.inf) if found is None else found.progress


# --- attributes that hold a size --------------------------------------------------------------------------------------
def _bind(trial: _Trial, telling: list[list[Binding]]) -> bool:
    """Adds to `telling` what alone is not enough but makes a difference."""
    graph, before = trial.graph, trial.graph.bindings
    tries = 0
    for candidate in _bindings.candidates(graph, trial.keep, trial.found):
        if trial.key(candidate) in trial.idle or (*candidate, trial.place) in trial.idle:
            continue
        graph.bindings = _bindings.with_new(before, candidate)
        then = trial.replay()
        if trial.is_further(then):
            trial.after = [then, *_bind_everywhere(trial, trial.plan, before, candidate, then)]
            return True
        if trial.tells(then):
            telling.append(candidate)
        elif _progress(then) < trial.found.progress:
            trial.idle.add((*candidate, trial.place))
        else:
            trial.idle.add(trial.key(candidate))
        tries += 1
        if tries == _TRIES:
            break
    graph.bindings = before
    return False


def _bind_everywhere(
    trial: _Trial, plan: _plan.Plan, before: list[Binding], found: list[Binding], then: Mismatch | None
) -> list[Mismatch | None]:
    """Binds the like on other modules too, unless that is worse; the mismatch then, where it was replayed."""
    graph = trial.graph
    everywhere = _bindings.everywhere(graph, found)
    if everywhere == found:
        return []
    graph.bindings = _bindings.with_new(before, everywhere)
    after = trial.replay(plan)
    if _progress(after) < _progress(then):
        graph.bindings = _bindings.with_new(before, found)
        return []
    return [after]


def _bind_pieces(trial: _Trial) -> bool:
    """Sizes of the pieces of a split in int attributes: bound all at once, because no piece fits before all do. Pieces
    that share an attribute are tied.
    """
    graph, before = trial.graph, trial.graph.bindings
    bound = {(b.module, b.attribute) for b in before}
    for call in calls_near(graph, trial.found):
        if len(call.outs) < 2 or "split_with_sizes" not in call.name:
            continue
        found = _bindings.piece_attributes(graph, call, trial.found)
        bindings = [b for b in found if (b.module, b.attribute) not in bound and trial.key([b]) not in trial.idle]
        if not bindings:
            continue
        ties, level = [], trial.keep
        for binding in bindings:
            for other in call.outs:
                tie = Tie((binding.tensor, binding.dim), (other, binding.dim))
                if other != binding.tensor and size_of(graph, tie.first) == size_of(graph, tie.second):
                    levelled = _ties.levelled(graph, level, tie)
                    if levelled is not None:
                        ties.append(tie)
                        level = levelled
        plan = graph.plan(level) if ties else trial.plan
        graph.bindings = before + bindings
        then = trial.replay(plan)
        if trial.is_further(then) and ties:
            graph.bindings = before + _bindings.everywhere(graph, bindings)
            graph.rebuild([*graph.ties, *(t for tie in ties for t in _ties.everywhere(graph, tie, trial.found))])
            return True
        if trial.is_further(then):
            trial.after = [then, *_bind_everywhere(trial, plan, before, bindings, then)]
            return True
        if not ties and _progress(then) == trial.found.progress and not trial.tells(then):
            trial.idle.update(trial.key([binding]) for binding in bindings)
    graph.bindings = before
    return False


# --- counts that have to be equal -------------------------------------------------------------------------------------
def _tie(trial: _Trial, telling: list[list[Binding]]) -> bool:
    """Ties two dims, alone or together with an attribute that is bound: an attention that takes `width // heads` of a
    residual stream for the width of a head runs only with both. Of such pairs each must make a difference by itself,
    or there would be too many.

    The stream then goes by whole heads, 12 classes instead of 768 channels in ViT-B. The alternative is to keep it and
    the heads, since their counts agree in neither half: with one class left of each group 37% of the MACs remain of
    ViT-B, 38% of Swin-T and 24% of MaxViT-T; tied, 0.6%, 1.7% and 2.4%.
    """
    graph, before = trial.graph, trial.graph.bindings
    both: list[tuple[Tie, _plan.Plan]] = []
    levels = ((tie, _ties.levelled(graph, trial.keep, tie)) for tie in _ties.candidates(graph, trial.keep, trial.found))
    for tie, level in itertools.islice((found for found in levels if found[1] is not None), _TRIES):
        plan = graph.plan(level)
        then = trial.replay(plan)
        if trial.is_further(then):
            graph.rebuild([*graph.ties, *_ties.everywhere(graph, tie, trial.found)])
            return True
        if trial.tells(then):
            both.append((tie, plan))
    for (tie, plan), candidate in itertools.product(both[:_PAIRS], telling):
        graph.bindings = _bindings.with_new(before, candidate)
        if trial.is_further(trial.replay(plan)):
            graph.bindings = _bindings.with_new(before, _bindings.everywhere(graph, candidate))
            graph.rebuild([*graph.ties, *_ties.everywhere(graph, tie, trial.found)])
            return True
    graph.bindings = before
    return False


# --- which axis survives a split --------------------------------------------------------------------------------------
def _resplit(trial: _Trial, seed: int) -> bool:
    """Heads or the width of a head, rows or columns of a shuffle: lets the other axis survive."""
    graph = trial.graph
    before = dict(vars(graph))  # to go back without grouping anew
    chosen, candidates = graph._core.survivors, graph._core.candidates
    near = sorted((abs(op - trial.found.op), op) for op in candidates if op not in graph.survivors)
    for _, op in [(distance, op) for distance, op in near if distance <= _SPLITS]:
        for axis in candidates[op]:
            if axis == chosen[op]:
                continue
            everywhere = dict.fromkeys(_same_operators(graph, op, trial.found), axis)
            classes = graph.num_classes
            graph.rebuild(graph.ties, graph.survivors | everywhere)
            # Half as many classes would buy the cut of one group with the freedom of others.
            enough = 2 * graph.num_classes > classes
            if enough and trial.is_further(_replay.compare(graph, graph.plan(_probe(graph, seed)))):
                return True
            vars(graph).update(before)
    return False


def _same_operators(graph: ChannelGraph, op: int, found: Mismatch) -> Iterator[int]:
    """The operator, and those in its place in other modules of the class of the module at fault."""
    yield op
    call = graph.recording.calls[op]
    index = {id(c): i for i, c in enumerate(graph.recording.calls)}
    for name in at_fault(graph, found):
        for _, other, _ in analogues(graph, name, (call.outs[0], 0)):
            yield index[id(other)]


# --- keeping ----------------------------------------------------------------------------------------------------------
def _keep_culprit(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> None:
    """Keeps the group whose cut alone brings the mismatch about, and its like in other modules. Failing that, the one
    with which the first k groups fail while the first k - 1 work.
    """
    cut = graph.cut_groups(keep)

    def failed(groups: list[int]) -> Mismatch | None:
        return _replay.compare(graph, graph.plan(graph.cut_only(keep, groups)))

    near = dict.fromkeys(g for call in calls_near(graph, found) for g in graph.cut_groups_at(call, keep))
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
    for name in at_fault(graph, found):
        for call in calls_of(graph, name):
            for tensor in tensors_of(call):
                for dim in range(len(graph.recording.shapes[tensor])):
                    if graph._core.groups_of(tensor, dim) == [group]:
                        for _, _, place in analogues(graph, name, (tensor, dim)):
                            yield from graph._core.groups_of(*place)
                        return
