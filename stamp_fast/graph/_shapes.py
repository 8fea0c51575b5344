"""Output shapes of operators without torch's meta kernels, or with each of them run once.

Those are Python decompositions that take a hundred times as long and are the bulk of a trace. Every function in FAST
returns what the meta kernel would, or NotImplemented where the case is not plain; tests hold each to the meta kernel.
Networks repeat their blocks, so what a kernel said of one operator on tensors of one kind is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

_META = torch.device("meta")


def _new(x: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor; `new_empty` and `empty_like` are Python on meta, and take ten times as long."""
    strides = [1] * len(shape)
    for d in range(len(shape) - 2, -1, -1):
        strides[d] = strides[d + 1] * max(1, shape[d + 1])
    return torch.empty_strided(shape, strides, dtype=x.dtype, device=_META)


def _like(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=_META)


def _like_first(args: tuple) -> Any:
    x = args[0]
    return _like(x) if x.is_floating_point() and _is_dense(x) else NotImplemented


def _is_dense(x: torch.Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def _in_place(args: tuple) -> Any:
    return args[0]


def _binary(args: tuple) -> Any:
    x, y = args[0], args[1]
    if not x.is_floating_point():
        return NotImplemented
    if not isinstance(y, torch.Tensor):
        return _like(x) if isinstance(y, (int, float)) and _is_dense(x) else NotImplemented
    if x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride() and _is_dense(x):
        return _like(x)
    return NotImplemented


def _binary_in_place(args: tuple) -> Any:
    x, y = args[0], args[1]
    fits = not isinstance(y, torch.Tensor) or (x.shape == y.shape and x.dtype == y.dtype)
    return x if fits and x.is_floating_point() else NotImplemented


def _batch_norm(args: tuple) -> Any:
    x = args[0]
    channels = x.shape[1] if x.dim() > 1 else -1
    if args[3] is None and not args[5]:
        return NotImplemented
    if any(t is not None and (t.shape != (channels,) or t.dtype != x.dtype) for t in args[1:5]):
        return NotImplemented
    if not _is_dense(x):
        return NotImplemented
    return _like(x), _new(x, (channels,)), _new(x, (channels,))


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
    return _new(x, shape)


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
    return _new(first, shape) if first.dim() and first.is_contiguous() else NotImplemented


def _layer_norm(args: tuple) -> Any:
    x, normalized = args[0], list(args[1])
    outer = x.dim() - len(normalized)
    if outer < 1 or list(x.shape[outer:]) != normalized or not x.is_contiguous() or x.dtype not in _FULL:
        return NotImplemented
    if any(t is not None and (list(t.shape) != normalized or t.dtype != x.dtype) for t in args[2:4]):
        return NotImplemented
    statistics = [*x.shape[:outer], *[1] * len(normalized)]
    return _like(x), _new(x, statistics), _new(x, statistics)


def _addmm(args: tuple) -> Any:
    bias, a, b = args[:3]
    plain = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and bias.shape == (b.shape[1],)
    if not plain or len(args) > 3 or not bias.dtype == a.dtype == b.dtype:
        return NotImplemented
    return _new(a, (a.shape[0], b.shape[1]))


_FULL = (torch.float32, torch.float64)  # half precision keeps its statistics in another dtype
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
    _ATEN.native_layer_norm.default: _layer_norm,
    _ATEN.addmm.default: _addmm,
    **{getattr(_ATEN, name).default: _like_first for name in _UNARY},
    **{getattr(_ATEN, name + "_").default: _in_place for name in _UNARY},
    **{getattr(_ATEN, name).Tensor: _binary for name in _BINARY},
    **{getattr(_ATEN, name + "_").Tensor: _binary_in_place for name in _BINARY},
}


_MOST = 20_000
_known: dict[Any, Any] = {}
_repeatable: dict[Any, bool] = {}


def remembered(func: Any, args: tuple, kwargs: dict) -> Any:
    """`func(*args, **kwargs)` on meta tensors; from memory where the operator makes new tensors only."""
    if not _is_repeatable(func):
        return func(*args, **kwargs)
    key = (func, _signature(args), _signature(tuple(kwargs.items())))
    try:
        known = _known.get(key)
    except TypeError:  # an argument that cannot be a key
        return func(*args, **kwargs)
    if known is not None:
        made = [torch.empty_strided(shape, stride, dtype=dtype, device=_META) for shape, stride, dtype in known[1]]
        return tuple(made) if known[0] else made[0]
    result = func(*args, **kwargs)
    is_tuple = isinstance(result, tuple)
    outs = result if is_tuple else (result,)
    if all(isinstance(t, torch.Tensor) and not t.requires_grad for t in outs):
        if len(_known) >= _MOST:
            _known.clear()
        _known[key] = is_tuple, [(t.shape, t.stride(), t.dtype) for t in outs]
    return result


def _is_repeatable(func: Any) -> bool:
    if func not in _repeatable:
        schema = func._schema
        aliases = any(a.alias_info is not None for a in (*schema.arguments, *schema.returns))
        _repeatable[func] = func.namespace == "aten" and not aliases and not schema.is_mutable
    return _repeatable[func]


def _signature(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple([_signature(item) for item in value])
    return type(value), value
