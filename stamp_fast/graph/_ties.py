"""Dims that the forward takes for equally wide: which could be, and in which modules they are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch

from ._places import Place, analogues, at_fault, changed_dims, size_of
from ._replay import Mismatch

if TYPE_CHECKING:
    from .graph import ChannelGraph


@dataclasses.dataclass(frozen=True)
class Tie:
    """Two dims of recorded tensors whose positions live or die together, because the forward wants equal counts."""

    first: tuple[int, int]
    second: tuple[int, int]


def candidates(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> list[Tie]:
    """Pairs of dims near the mismatch that are equally wide in the dense network but not in the smaller one."""
    first: dict[tuple[int, int, bool], tuple[int, int]] = {}
    seen: set[int] = set()
    for tensor, dim, size, left in changed_dims(graph, keep, found):
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


def _in_runs(graph: ChannelGraph, place: Place) -> bool:
    """Whether positions of one class are next to each other."""
    classes = _classes(graph, place)
    return len(classes.unique_consecutive()) == len(classes.unique())


def levelled(graph: ChannelGraph, keep: torch.Tensor, tie: Tie) -> torch.Tensor | None:
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


def _classes(graph: ChannelGraph, place: Place) -> torch.Tensor:
    """Class of every position of a dim; -1 where it never goes."""
    return torch.from_numpy(graph._core.axis_classes(graph._core.axis_of(*place)))


def everywhere(graph: ChannelGraph, tie: Tie, found: Mismatch) -> list[Tie]:
    result = [tie]
    for name in at_fault(graph, found):
        seconds = {other: place for other, _, place in analogues(graph, name, tie.second)}
        for other, _, first in analogues(graph, name, tie.first):
            if other in seconds and size_of(graph, first) == size_of(graph, seconds[other]):
                alike = Tie(first, seconds[other])
                if _can_tie(graph, alike):
                    result.append(alike)
    return result
