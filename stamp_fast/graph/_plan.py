"""What a choice of channels means for every parameter, buffer and module attribute of the model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..ops import convolutions, gather
from ._align import base_name
from ._record import Ref
from ._undisturbed import named_modules

if TYPE_CHECKING:
    from .graph import ChannelGraph


@dataclasses.dataclass
class Plan:
    """Per slot the positions that stay along each dim (None: all), and the attributes that change with them."""

    graph: ChannelGraph
    keep: torch.Tensor
    kept: list[list[torch.Tensor | None]]
    layers: list[tuple[nn.Module, str, Any]] = dataclasses.field(default_factory=list)  # attributes of torch's own
    bound: list[tuple[nn.Module, str, Any]] = dataclasses.field(default_factory=list)

    @property
    def attributes(self) -> list[tuple[nn.Module, str, Any]]:
        return self.layers + self.bound

    def shrinks(self, slot: int) -> bool:
        return any(index is not None for index in self.kept[slot])

    def shape(self, slot: int) -> tuple[int, ...]:
        old = self.graph.recording.shapes[slot]
        return tuple(n if i is None else i.numel() for n, i in zip(old, self.kept[slot], strict=True))

    def gather(self, slot_of: list[int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The live part of `tensors[i]`, which is shaped like slot `slot_of[i]` but for dims of size 1."""
        kept = []
        for slot, tensor in zip(slot_of, tensors, strict=True):
            sizes = zip(self.kept[slot], tensor.shape, self.graph.recording.shapes[slot], strict=True)
            kept.append([index if mine == theirs else None for index, mine, theirs in sizes])
        return gather(tensors, kept)

    @contextlib.contextmanager
    def virtual(self, scale: torch.Tensor | None = None) -> Iterator[None]:
        """Swaps every parameter for its packed, scaled live part and sets the attributes; undone at exit."""
        slots = self.graph.slots
        scales = [None if scale is None else self._reader_scale(i, scale) for i in range(len(slots))]
        parameters = [i for i, s in enumerate(slots) if s.is_parameter and (self.shrinks(i) or scales[i] is not None)]
        packed = gather(
            [slots[i].tensor for i in parameters], [self.kept[i] for i in parameters], [scales[i] for i in parameters]
        )
        # Buffers by themselves: an operator with one differentiable input makes all its outputs differentiable.
        buffers = [i for i, slot in enumerate(slots) if not slot.is_parameter]
        with torch.no_grad():
            copies = gather([slots[i].tensor.clone() for i in buffers], [self.kept[i] for i in buffers])
        replacement = dict(zip([*parameters, *buffers], [*packed, *copies], strict=True))
        with swapped(self, replacement), convolutions():
            yield

    def _reader_scale(self, slot: int, scale: torch.Tensor) -> tuple[int, torch.Tensor] | None:
        """The dim by which this parameter reads channels and the factor of each live position, if it reads any."""
        dim = self.graph.reader_dim(slot)
        if dim is None:
            return None
        axis = self.graph.slots[slot].axes[dim]
        index = self.kept[slot][dim]
        live = (axis if index is None else axis[index]).to(scale.device)
        if bool((live >= 0).all()):
            return dim, scale[live]
        return dim, torch.where(live >= 0, scale[live.clamp(min=0)], torch.ones_like(scale[:1]))


@contextlib.contextmanager
def swapped(plan: Plan, replacement: dict[int, torch.Tensor]) -> Iterator[None]:
    """Puts the tensors in the place of the slots they are given for and sets the attributes; undone at exit."""
    undo: list[tuple[dict, str, Any]] = []
    try:
        for i, slot in enumerate(plan.graph.slots):
            if i not in replacement:
                continue
            for module, key in slot.owners:
                table = module._parameters if slot.is_parameter else module._buffers
                undo.append((table, key, table[key]))
                table[key] = replacement[i]
                if isinstance(module, nn.RNNBase) and slot.is_parameter:
                    # Recurrent layers keep their parameters in a list too.
                    undo.append((module.__dict__, "_flat_weights", module._flat_weights))
                    module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]
        torch.clear_autocast_cache()  # it holds casts of parameters by object
        with attributes_set(plan.attributes):
            yield
    finally:
        torch.clear_autocast_cache()
        for table, key, tensor in reversed(undo):
            table[key] = tensor


@contextlib.contextmanager
def attributes_set(attributes: list[tuple[nn.Module, str, Any]]) -> Iterator[None]:
    undo = [(module, name, getattr(module, name)) for module, name, _ in attributes]
    try:
        for module, name, value in attributes:
            setattr(module, name, value)
        yield
    finally:
        for module, name, value in reversed(undo):
            setattr(module, name, value)


def make(graph: ChannelGraph, keep: torch.Tensor) -> Plan:
    indices: dict[int, torch.Tensor | None] = {}  # slots share their axes

    def live(axis: torch.Tensor | None) -> torch.Tensor | None:
        if axis is None:
            return None
        if id(axis) not in indices:
            stays = (axis < 0) | keep[axis.clamp(min=0)]
            indices[id(axis)] = None if bool(stays.all()) else stays.nonzero().flatten()
        return indices[id(axis)]

    kept = [[live(axis) for axis in slot.axes] for slot in graph.slots]
    plan = Plan(graph, keep, kept)
    plan.layers = _attributes(graph, plan)
    return bound_anew(plan)


def bound_anew(plan: Plan) -> Plan:
    """The same cut with the bindings that the graph has by now."""
    return dataclasses.replace(plan, bound=_bound(plan.graph, plan))


def _attributes(graph: ChannelGraph, plan: Plan) -> list[tuple[nn.Module, str, Any]]:
    """New widths of torch's own layers, from their parameters; sizes without a parameter from the calls they made."""
    new_shape = {}
    for i, slot in enumerate(graph.slots):
        for module, key in slot.owners:
            new_shape[id(module), key] = plan.shape(i)
    scalars: dict[str, dict[int, int]] = {}
    for op, arg, value in graph._core.scalar_args(graph._bytes(plan.keep)):
        scalars.setdefault(graph.recording.calls[op].module, {})[arg] = value

    changes = []
    for name, module in named_modules(graph.model).items():
        weight = new_shape.get((id(module), "weight"))
        if weight is None and isinstance(module, (_ConvNd, nn.Linear)):
            weight = _computed_weight(graph, plan, name)
        widths = _widths(module, weight, scalars.get(name, {}), new_shape)
        if isinstance(module, _NormBase) and not widths:
            widths = _width_of_input(graph, plan, name)
        for attribute, value in widths.items():
            if getattr(module, attribute) != value:
                changes.append((module, attribute, value))
    return changes


def _bound(graph: ChannelGraph, plan: Plan) -> list[tuple[nn.Module, str, Any]]:
    """Attributes of the model's own classes that were found to hold a width."""
    shapes = graph._core.shapes(graph._bytes(plan.keep)) if graph.bindings else []
    values: dict[tuple[str, str], Any] = {}
    for binding in graph.bindings:
        where = binding.module, binding.attribute
        width = binding.times * shapes[binding.tensor][binding.dim]
        if binding.item is None:
            values[where] = width
        else:
            items = values.setdefault(where, list(getattr(graph.model.get_submodule(binding.module), where[1])))
            items[binding.item] = width
    changes = []
    for (name, attribute), value in values.items():
        module = graph.model.get_submodule(name)
        old = getattr(module, attribute)
        value = type(old)(value) if isinstance(old, tuple) else value
        if old != value:
            changes.append((module, attribute, value))
    return changes


def _computed_weight(graph: ChannelGraph, plan: Plan, name: str) -> tuple[int, ...] | None:
    """A layer whose weight is made of others (parametrized, masked): the shape with which it calls its operator."""
    for call in graph.recording.calls:
        operator = base_name(call.name)
        if call.module == name and operator in ("convolution", "mm", "addmm"):
            shape = graph._core.shapes(graph._bytes(plan.keep))[call.args[2 if operator == "addmm" else 1]]
            return tuple(shape) if operator == "convolution" else tuple(shape[::-1])
    return None


def _width_of_input(graph: ChannelGraph, plan: Plan, name: str) -> dict[str, int]:
    """A norm without parameters or statistics: its width is that of what it is given."""
    for call in graph.recording.calls:
        if call.module == name and isinstance(call.args[0], Ref):
            return {"num_features": graph._core.shapes(graph._bytes(plan.keep))[call.args[0]][1]}
    return {}


_KNOWN = {
    _ConvNd: ("in_channels", "out_channels", "groups"),
    nn.Linear: ("in_features", "out_features"),
    _NormBase: ("num_features",),
    nn.GroupNorm: ("num_channels", "num_groups"),
    nn.LayerNorm: ("normalized_shape",),
    nn.RNNBase: ("input_size", "hidden_size", "proj_size"),
    nn.PReLU: ("num_parameters",),
    nn.Embedding: ("num_embeddings", "embedding_dim"),
    nn.MultiheadAttention: ("embed_dim", "kdim", "vdim", "num_heads", "head_dim"),
}


def known_widths(module: nn.Module) -> set[str]:
    """Attributes of torch's own layers that follow from their parameters (`_widths`)."""
    return {name for kind, names in _KNOWN.items() if isinstance(module, kind) for name in names}


def _widths(module: nn.Module, weight: tuple | None, scalars: dict[int, int], new_shape: dict) -> dict[str, Any]:
    if isinstance(module, _ConvNd) and weight is not None:
        groups = scalars.get(8, module.groups) if module.groups > 1 else 1
        if isinstance(module, _ConvTransposeNd):
            return {"in_channels": weight[0], "out_channels": weight[1] * groups, "groups": groups}
        return {"in_channels": weight[1] * groups, "out_channels": weight[0], "groups": groups}
    if isinstance(module, nn.Linear) and weight is not None:
        return {"in_features": weight[1], "out_features": weight[0]}
    if isinstance(module, _NormBase):
        shape = weight or new_shape.get((id(module), "running_mean"))
        return {} if shape is None else {"num_features": shape[0]}
    if isinstance(module, nn.GroupNorm):
        channels = weight[0] if weight is not None else scalars.get(4, module.num_channels)
        return {"num_channels": channels, "num_groups": scalars.get(6, module.num_groups)}
    if isinstance(module, nn.LayerNorm) and weight is not None:
        return {"normalized_shape": tuple(weight)}
    if isinstance(module, nn.RNNBase):
        inputs, hidden = new_shape[id(module), "weight_ih_l0"], new_shape[id(module), "weight_hh_l0"]
        if module.proj_size:
            return {"input_size": inputs[1], "hidden_size": hidden[0] // 4, "proj_size": hidden[1]}
        return {"input_size": inputs[1], "hidden_size": hidden[1]}
    if isinstance(module, nn.PReLU) and weight is not None:
        return {"num_parameters": weight[0]}
    if isinstance(module, nn.MultiheadAttention):
        return _widths_of_attention(module, new_shape)
    if isinstance(module, nn.Embedding) and weight is not None:
        return {"num_embeddings": weight[0], "embedding_dim": weight[1]}
    return {}


def _widths_of_attention(module: nn.MultiheadAttention, new_shape: dict) -> dict[str, int]:
    """Heads go whole: their width is the scale of the scores."""
    if module.in_proj_weight is not None:
        rows, query = new_shape[id(module), "in_proj_weight"]
        rows, key, value = rows // 3, query, query
    else:
        rows, query = new_shape[id(module), "q_proj_weight"]
        key, value = (new_shape[id(module), f"{name}_proj_weight"][1] for name in "kv")
    return {"embed_dim": query, "kdim": key, "vdim": value, "num_heads": max(1, rows // module.head_dim)}
