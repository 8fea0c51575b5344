"""What torch's own layers did in a trace, so that the next like them need not run: networks repeat their blocks."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation, batchnorm, conv, dropout, linear, normalization, pooling

_MOST = 5_000
_MODULES = (activation, batchnorm, conv, dropout, linear, normalization, pooling)
# Exactly these: a subclass may do anything.
LAYER_TYPES = frozenset(
    kind
    for module in _MODULES
    for kind in vars(module).values()
    if isinstance(kind, type)
    and issubclass(kind, nn.Module)
    and kind.__module__ == module.__name__
    and not issubclass(kind, (nn.MultiheadAttention, nn.modules.lazy.LazyModuleMixin))
)
_STANDARD = frozenset(nn.Module().__dict__) - {"training"}


class Ref(int):
    """Index of a tensor among an operator's recorded arguments."""


class Place(int):
    """Stands for a tensor in a template: the input, the layer's own, then those that it made."""


@dataclasses.dataclass(slots=True)
class Template:
    """The calls of a layer, with places for tensors.

    Attributes:
        calls: (operator, arguments, places of the outputs).
        made: (shape, stride, dtype) of the tensors that the layer makes, in order.
        result: place of what it returns.
    """

    calls: list[tuple[str, tuple, list[int]]]
    made: list[tuple]
    result: int


_HOOKS = tuple(name for name, value in vars(nn.Module()).items() if "hook" in name and isinstance(value, dict))
_known: dict[Any, Template] = {}


def own_tensors(layer: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a layer, in the order of their places."""
    return [t for table in (layer._parameters, layer._buffers) for t in table.values() if t is not None]


def key_of(layer: nn.Module, x: torch.Tensor) -> Any:
    """All that decides what the layer does with the tensor; None where something is unusual."""
    attributes = layer.__dict__
    if any(attributes[name] for name in _HOOKS) or "forward" in attributes or attributes["_modules"]:
        return None
    settings = tuple(
        [(k, v) for k, v in attributes.items() if k not in _STANDARD and not (k[0] == "_" and type(v) is list)]
    )
    own = tuple([(t.shape, t.stride(), t.dtype) for t in own_tensors(layer)])
    names = tuple([name for table in (layer._parameters, layer._buffers) for name, t in table.items() if t is not None])
    # With its forward, which somebody may have put there.
    key = type(layer), type(layer).forward, settings, names, own, x.shape, x.stride(), x.dtype
    try:
        hash(key)
    except TypeError:
        return None
    return key


def known(key: Any) -> Template | None:
    return _known.get(key)


def learn(
    key: Any,
    tensors: list[torch.Tensor],
    first_made: int,
    indices: list[int],
    calls: list[tuple[str, tuple, list[int]]],
    result: Any,
) -> None:
    """Remembers what a layer has just done.

    Args:
        tensors: its input, its own, and those that it made.
        first_made: place of the first that it made.
        indices: of `tensors` in the recording.
        calls: (operator, arguments with indices of tensors, indices of outputs), as recorded.
        result: what it returned.
    """
    if len(set(indices)) != len(indices):  # two places for one tensor
        return
    places = {index: Place(place) for place, index in enumerate(indices)}
    returned = [place for place, tensor in enumerate(tensors) if tensor is result]
    found = []
    for name, args, outs in calls:
        if any(isinstance(a, Ref) and a not in places for a in args) or any(o not in places for o in outs):
            return
        if any(isinstance(item, Ref) for a in args if isinstance(a, (list, tuple)) for item in a):
            return
        found.append((name, tuple([places[a] if isinstance(a, Ref) else a for a in args]), [places[o] for o in outs]))
    if len(returned) != 1:
        return
    if len(_known) >= _MOST:
        _known.clear()
    _known[key] = Template(found, [(t.shape, t.stride(), t.dtype) for t in tensors[first_made:]], returned[0])
