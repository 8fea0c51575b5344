"""Attributes of modules that hold a width: which could, and on which modules they do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import nn

from . import _plan, _record
from ._places import analogues, calls_near, changed_sizes, size_of
from ._replay import Mismatch

if TYPE_CHECKING:
    import torch

    from .graph import ChannelGraph


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


def with_new(bindings: list[Binding], new: list[Binding]) -> list[Binding]:
    """An attribute that was bound to the wrong one of two equal widths is bound anew."""
    again = {(b.module, b.attribute, b.item) for b in new}
    return [b for b in bindings if (b.module, b.attribute, b.item) not in again] + new


def candidates(graph: ChannelGraph, keep: torch.Tensor, found: Mismatch) -> Iterator[list[Binding]]:
    shapes = graph._core.shapes(graph._bytes(keep))
    bound = {(b.module, b.attribute, b.item, b.times * shapes[b.tensor][b.dim]) for b in graph.bindings}
    sizes = changed_sizes(graph, keep, found)
    for times in (1, 2, 3, 4):
        for name in found.modules:
            for attribute, value in _int_attributes(graph.model.get_submodule(name)):
                if isinstance(value, int):
                    for tensor, dim, size in sizes:
                        now = times * shapes[tensor][dim]
                        if value == times * size and (name, attribute, None, now) not in bound:
                            yield [Binding(name, attribute, None, tensor, dim, times)]
                elif times == 1 and not any(b[:3] == (name, attribute, 0) for b in bound):
                    for call in calls_near(graph, found):
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


def piece_attributes(graph: ChannelGraph, call: _record.Call, found: Mismatch) -> list[Binding]:
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


def everywhere(graph: ChannelGraph, bindings: list[Binding]) -> list[Binding]:
    """The same bindings on every module of the same class, where its attribute has the value."""
    result = list(bindings)
    whole_list = len(bindings) > 1 and bindings[0].item is not None
    for binding in bindings[:1] if whole_list else bindings:
        for name, call, (tensor, dim) in analogues(graph, binding.module, (binding.tensor, binding.dim)):
            value = getattr(graph.model.get_submodule(name), binding.attribute, None)
            if whole_list:
                if isinstance(value, (list, tuple)):
                    result += _pieces(graph, call, name, binding.attribute, value)
                continue
            if binding.item is not None:
                has_item = isinstance(value, (list, tuple)) and len(value) > binding.item
                value = value[binding.item] if has_item else None
            if value == binding.times * size_of(graph, (tensor, dim)):
                result.append(dataclasses.replace(binding, module=name, tensor=tensor, dim=dim))
    return result
