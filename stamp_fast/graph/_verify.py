"""The dense network with dead channels masked where they are read: what the smaller one has to compute."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import TraceError
from . import _plan, _record
from ._align import Aligned
from ._record import Ref
from ._recorder import in_schema_order
from ._undisturbed import emptied

if TYPE_CHECKING:
    from .graph import ChannelGraph


def masked_output(graph: ChannelGraph, keep: torch.Tensor, inputs: Any) -> Any:
    """One eval-mode forward of the dense network in which no dead channel reaches anything that reads it.

    Where an operator sums over channels, dead ones are multiplied by zero; where it normalises over them, it is
    computed on the live ones alone. Slow and obvious: every operator of the dense network runs.

    Raises:
        TraceError: the forward runs other operators on real tensors than it did when traced.
    """
    keep = graph.checked(keep)
    mode = _Masked(graph, keep)
    zeroed = _zeroed_readers(graph, keep, mode.apart)
    with _plan.swapped(graph.plan(graph.all_kept()), zeroed), emptied(graph.recording.caches):
        output = _record.evaluate(graph.model, inputs, mode)
    missed = mode.missed()
    if missed:
        raise TraceError(f"the forward does not run {graph.recording.calls[missed[0]]}, which its recording has")
    return output


def _zeroed_readers(graph: ChannelGraph, keep: torch.Tensor, layers: set[str]) -> dict[int, torch.Tensor]:
    """Recurrent layers run operators of each device's own. Their weights, with zeros where they read dead channels."""
    zeroed = {}
    for read in graph._core.reads:
        if graph.recording.calls[read.op].module not in layers:
            continue
        if not (read.exact and read.slot >= 0 and graph.reader_dim(read.slot) == read.slot_dim):
            raise TraceError(f"{graph.recording.calls[read.op]} cannot be masked")
        tensor, axis = graph.slots[read.slot].tensor.detach(), graph.slots[read.slot].axes[read.slot_dim]
        alive = ((axis < 0) | keep[axis.clamp(min=0)]).to(tensor.device, tensor.dtype)
        zeroed[read.slot] = tensor * alive.view([-1 if d == read.slot_dim else 1 for d in range(tensor.dim())])
    return zeroed


def difference(a: Any, b: Any) -> float:
    """Largest absolute difference of two outputs, relative to the largest absolute value of the second."""
    pairs = list(zip(_record._output_tensors(a), _record._output_tensors(b), strict=True))
    scale = max((y.abs().max().item() for _, y in pairs if y.numel()), default=0.0)
    worst = max(((x.double() - y.double()).abs().max().item() for x, y in pairs if y.numel()), default=0.0)
    return worst / scale if scale > 0 else worst


class _Masked(Aligned):
    def __init__(self, graph: ChannelGraph, keep: torch.Tensor) -> None:
        self.apart = {name for name, module in graph.model.named_modules() if isinstance(module, nn.RNNBase)}
        self.reads: dict[int, list] = {}
        for read in graph._core.reads:
            if graph.recording.calls[read.op].module not in self.apart:
                self.reads.setdefault(read.op, []).append(read)
        super().__init__(graph, set(self.reads), self.apart)
        self.scalars: dict[int, dict[int, int]] = {}
        for op, arg, value in graph._core.scalar_args(graph._bytes(keep)):
            self.scalars.setdefault(op, {})[arg] = value
        self.live = []
        for layers in graph._core.axes:
            alive = torch.ones(len(layers[0]), dtype=torch.bool)
            for layer in layers:
                classes = torch.from_numpy(layer).long()
                alive &= (classes < 0) | keep[classes.clamp(min=0)]
            self.live.append(alive)

    def _live(self, tensor: int, dim: int) -> torch.Tensor | None:
        axis = self.graph._core.axis_of(tensor, dim)
        return None if axis < 0 or self.live[axis].all() else self.live[axis]

    def on_call(self, op: int, func, args: tuple, kwargs: dict, shift: int = 0):
        if op not in self.reads:
            return func(*args, **kwargs)
        values = in_schema_order(func, args, kwargs)
        if all(read.exact for read in self.reads[op]):
            return self._masked(func, values, op, shift)
        return self._on_live_part(func, values, op)

    def _masked(self, func, values: list, op: int, shift: int):
        call = self.graph.recording.calls[op]
        for read in self.reads[op]:
            alive = self._live(read.tensor, read.dim)
            if alive is None:
                continue
            position = next(i for i, a in enumerate(call.args) if isinstance(a, Ref) and a == read.tensor) - shift
            operand = values[position]
            if operand.dim() <= read.dim or operand.shape[read.dim] != alive.numel():
                raise TraceError(f"the forward gives {call.name} another operand than was recorded")
            factor = alive.to(operand.device, operand.dtype)
            values[position] = operand * factor.view([-1 if d == read.dim else 1 for d in range(operand.dim())])
        return _call(func, values)

    def _on_live_part(self, func, values: list, op: int):
        call = self.graph.recording.calls[op]
        for position, ref in enumerate(call.args):
            if not isinstance(ref, Ref):
                continue
            for dim in range(values[position].dim()):
                alive = self._live(ref, dim)
                if alive is not None:
                    index = alive.nonzero().flatten().to(values[position].device)
                    values[position] = values[position].index_select(dim, index)
        for position, value in self.scalars.get(op, {}).items():
            values[position] = value
        if "native_layer_norm" in call.name:
            values[1] = list(values[0].shape[values[0].dim() - len(values[1]) :])
        result = _call(func, values)
        outs = [result] if isinstance(result, torch.Tensor) else list(result)
        for k, (position, small) in enumerate(zip(call.outs, outs, strict=True)):
            for dim in range(small.dim()):
                alive = self._live(position, dim)
                if alive is None:
                    continue
                shape = list(small.shape)
                shape[dim] = alive.numel()
                dense = small.new_ones(shape)  # any number that stays finite: a length of 0 would divide what is dead
                dense.index_copy_(dim, alive.nonzero().flatten().to(small.device), small)
                small = dense
            outs[k] = small
        return outs[0] if isinstance(result, torch.Tensor) else tuple(outs)


def _call(func, values: list):
    """Calls an operator with all its arguments in schema order, keyword-only ones by name."""
    arguments = func._schema.arguments
    positional = [v for v, a in zip(values, arguments, strict=True) if not a.kwarg_only]
    keyword = {a.name: v for v, a in zip(values, arguments, strict=True) if a.kwarg_only}
    return func(*positional, **keyword)
