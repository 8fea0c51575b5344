"""Output shapes of the operators that make up most of a network, without torch's meta kernels.

Those are Python decompositions that take a hundred times as long and are the bulk of a trace. Every function returns
what the meta kernel would, or NotImplemented where the case is not plain; tests hold each to the meta kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _like_first(args: tuple) -> Any:
    x = args[0]
    return torch.empty_like(x) if x.is_floating_point() else NotImplemented


def _in_place(args: tuple) -> Any:
    return args[0]


def _binary(args: tuple) -> Any:
    x, y = args[0], args[1]
    if not x.is_floating_point():
        return NotImplemented
    if not isinstance(y, torch.Tensor):
        return torch.empty_like(x) if isinstance(y, (int, float)) else NotImplemented
    if x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride():
        return torch.empty_like(x)
    return NotImplemented


def _binary_in_place(args: tuple) -> Any:
    x, y = args[0], args[1]
    fits = not isinstance(y, torch.Tensor) or (x.shape == y.shape and x.dtype == y.dtype)
    return x if fits and x.is_floating_point() else NotImplemented


def _batch_norm(args: tuple) -> Any:
    x, training = args[0], args[5]
    mean = args[3]
    channels = x.shape[1] if x.dim() > 1 else -1
    if training or mean is None or mean.shape != (channels,) or mean.dtype != x.dtype:
        return NotImplemented
    if any(t is not None and t.shape != (channels,) for t in (args[1], args[2], args[4])):
        return NotImplemented
    return torch.empty_like(x), x.new_empty(channels), x.new_empty(channels)


def _convolution(args: tuple) -> Any:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    rank = weight.dim()
    plain = x.dim() == rank and x.dtype == weight.dtype and x.is_contiguous() and weight.is_contiguous()
    if transposed or not plain or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return NotImplemented
    if bias is not None and bias.shape != (weight.shape[0],):
        return NotImplemented
    shape = [x.shape[0], weight.shape[0]]
    for k in range(rank - 2):
        s, p, d = (v[k] if len(v) > 1 else v[0] for v in (stride, padding, dilation))
        size = (x.shape[k + 2] + 2 * p - d * (weight.shape[k + 2] - 1) - 1) // s + 1
        if size < 1:
            return NotImplemented
        shape.append(size)
    return x.new_empty(shape)


def _cat(args: tuple) -> Any:
    tensors = args[0]
    first = tensors[0]
    dim = (args[1] if len(args) > 1 else 0) % max(1, first.dim())
    shape = list(first.shape)
    for t in tensors[1:]:
        if t.dim() != first.dim() or t.dtype != first.dtype or not t.is_contiguous():
            return NotImplemented
        if any(a != b for d, (a, b) in enumerate(zip(shape, t.shape, strict=True)) if d != dim):
            return NotImplemented
        shape[dim] += t.shape[dim]
    return first.new_empty(shape) if first.dim() and first.is_contiguous() else NotImplemented


_ATEN = torch.ops.aten
_UNARY = (
    *("relu", "silu", "gelu", "sigmoid", "hardswish", "hardsigmoid", "hardtanh"),
    *("tanh", "leaky_relu", "elu", "mish"),
)
_BINARY = ("add", "sub", "mul", "div")

FAST: dict[Any, Callable[[tuple], Any]] = {
    _ATEN.convolution.default: _convolution,
    _ATEN.native_batch_norm.default: _batch_norm,
    _ATEN.cat.default: _cat,
    **{getattr(_ATEN, name).default: _like_first for name in _UNARY},
    **{getattr(_ATEN, name + "_").default: _in_place for name in _UNARY},
    **{getattr(_ATEN, name).Tensor: _binary for name in _BINARY},
    **{getattr(_ATEN, name + "_").Tensor: _binary_in_place for name in _BINARY},
}
