"""Convolution over live channels, with what stands before and after it in a network fused in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import config
from . import _reference
from ._backend import choose, note, on_device
from ._tensors import autocast_dtype, differentiable_once, memory_format, new_empty, pair
from .pack_weights import pack_weights

Pair = int | Sequence[int]
_NAME = "stamp_fast::masked_conv2d"


def masked_conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rows: Tensor | None = None,
    cols: Tensor | None = None,
    scale: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    residual: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair = 0,
    dilation: Pair = 1,
    groups: int = 1,
    statistics: bool = False,
    backend: config.Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`conv2d(relu(input * norm[0] + norm[1]), weight[rows][:, cols] * scale) + bias + residual`, on live channels.

    Differentiable once, in everything but the indices. Under autocast input, weight, bias, scale and residual are cast.

    Args:
        input: (n, i, h, w), live channels only; float32, float64, bfloat16 or float16. Output and its gradient keep
            its memory format (contiguous or channels_last).
        weight: (O, I, kh, kw), dense, of the input's dtype.
        bias: (o,), of the live output channels.
        rows: (o,) int64, live output channels, each at most once; None: all.
        cols: (i,) int64, live input channels (within a group, the same in all), each at most once; None: all.
        scale: (i,) factors of the live input channels: the mask. Only without groups.
        norm: two of (i,), float32 (float64 for float64): the input is taken as what a batch norm is given, normalised
            and rectified as it is read. The padding is zero after that. None: the input is read as it is.
        residual: (n, o, h', w'), added to the output.
        groups: of the live channels.
        statistics: also return the sums over the output and over its squares, in float64: a variance made of the two
            loses digits where the mean is far larger than the deviation.
        backend: see `stamp_fast.config`; None: what is set there.

    Returns:
        (n, o, h', w'), with `statistics` and (2, o) of float64.

    Raises:
        ArgumentError: the backend cannot take this call.
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it. An index out of range is
            noticed on the CPU alone.
    """
    dtype = autocast_dtype(input)
    if dtype is not None:
        input, weight, bias, scale, residual = (_cast(t, dtype) for t in (input, weight, bias, scale, residual))
    elif scale is not None:
        scale = scale.to(weight.dtype)
    chosen = choose("masked_conv2d", input, backend, has_triton=groups == 1)
    moves = [pair("masked_conv2d", *m) for m in (("stride", stride), ("padding", padding), ("dilation", dilation))]
    norm_scale, norm_shift = (None, None) if norm is None else norm
    arguments = input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual, *moves, groups
    if chosen == "reference":
        _checked_shape(*arguments)
        note("masked_conv2d", chosen)
        output, sums = _reference.masked_conv2d(*arguments, statistics)
    else:
        output, sums = torch.ops.stamp_fast.masked_conv2d(*arguments, statistics, chosen)
    return (output, sums) if statistics else output


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Autocast leaves float64 as it is.
    return tensor if tensor is None or tensor.dtype == torch.float64 else tensor.to(dtype)


# --- shapes -----------------------------------------------------------------------------------------------------------
def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(condition: bool, text: str) -> None:
    torch._check(condition, lambda: f"masked_conv2d: {text}")


def _checked_shape(
    input: Tensor, weight: Tensor, bias, rows, cols, scale, norm_scale, norm_shift, residual,
    stride, padding, dilation, groups: int,
) -> list[int]:  # fmt: skip
    """Shape of the output, with the checks that need no data."""
    _check(input.ndim == 4, f"input must have 4 dimensions, got {tuple(input.shape)}")
    _check(weight.ndim == 4, f"weight must have 4 dimensions, got {tuple(weight.shape)}")
    _check(input.is_floating_point(), f"input must be of a floating-point dtype, got {input.dtype}")
    for name, two, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        _check(len(two) == 2 and all(v >= least for v in two), f"{name} must be two numbers >= {least}, got {two}")
    out = weight.shape[0] if rows is None else rows.numel()
    inner = weight.shape[1] if cols is None else cols.numel()
    for name, index in (("rows", rows), ("cols", cols)):
        _check(index is None or index.numel() >= 1, f"{name} must hold at least one position; None keeps all")
    _check(groups >= 1 and out % groups == 0, f"groups must divide the {out} live output channels, got {groups}")
    live = inner * groups
    _check(input.shape[1] == live, f"input must have {live} live channels, got {tuple(input.shape)}")
    sizes = [
        (size + 2 * pad - dil * (kernel - 1) - 1) // step + 1
        for size, kernel, step, pad, dil in zip(
            input.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True
        )
    ]
    _check(all(n >= 1 for n in sizes), f"the kernel {tuple(weight.shape[2:])} is larger than {tuple(input.shape[2:])}")
    shape = [input.shape[0], out, *sizes]
    _check(scale is None or groups == 1, "scale is for convolutions without groups")
    _check((norm_scale is None) == (norm_shift is None), "norm must be a scale and a shift")
    wide = _wide(input.dtype)
    for name, tensor, wanted, dtype in (
        ("weight", weight, list(weight.shape), input.dtype),
        ("bias", bias, [out], input.dtype),
        ("scale", scale, [live], input.dtype),
        ("norm[0]", norm_scale, [live], wide),
        ("norm[1]", norm_shift, [live], wide),
        ("residual", residual, shape, input.dtype),
        ("rows", rows, [out], torch.int64),
        ("cols", cols, [inner], torch.int64),
    ):
        if tensor is not None:
            _check(list(tensor.shape) == wanted, f"{name} must have shape {wanted}, got {tuple(tensor.shape)}")
            _check(tensor.dtype == dtype, f"{name} must be {dtype}, got {tensor.dtype}")
            _check(tensor.device == input.device, f"{name} must be on {input.device}, got {tensor.device}")
    return shape


@torch.library.register_fake(_NAME)
def _(input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual,
      stride, padding, dilation, groups, statistics, backend):  # fmt: skip
    shape = _checked_shape(
        input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual, stride, padding, dilation, groups
    )
    sums = input.new_empty((2, shape[1]) if statistics else 0, dtype=torch.float64)
    return new_empty(input, shape), sums


# --- forward ----------------------------------------------------------------------------------------------------------
def _forward(input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual,
             stride, padding, dilation, groups, statistics, backend):  # fmt: skip
    _checked_shape(
        input, weight, bias, rows, cols, scale, norm_scale, norm_shift, residual, stride, padding, dilation, groups
    )
    _check_indices(weight, rows, cols)
    note("masked_conv2d", backend)
    fused = (bias, rows, cols, scale, norm_scale, norm_shift, residual)
    moves = (stride, padding, dilation)
    if backend == "triton":
        from ..kernels.triton import masked_conv2d as kernels

        problem = kernels.Problem(input, weight, rows, cols, *moves)
        other = None if residual is None else _channels_last(residual)
        with on_device(input):
            vectors = map(_contiguous, fused[:-1])
            output, sums = kernels.masked_conv2d(problem, _channels_last(input), weight, *vectors, other, statistics)
    else:
        packed, read = _packed(weight, rows, cols, scale), _normalised(input, norm_scale, norm_shift)
        if _depthwise(packed, groups):
            output = torch.ops.stamp_fast.depthwise_conv2d(read, packed, *moves)
            output = output if bias is None else output + bias.view(1, -1, 1, 1)
        else:
            output = torch.conv2d(read, packed, bias, *moves, groups)
        if residual is not None:
            output += residual
        sums = _sums(output) if statistics else None
    sums = input.new_empty(0, dtype=torch.float64) if sums is None else sums
    return output.contiguous(memory_format=memory_format(input)), sums


def _check_indices(weight: Tensor, rows: Tensor | None, cols: Tensor | None) -> None:
    """On the CPU: a GPU would have to be waited for. `MaskedConv2d.set_mask` has checked its positions before."""
    for name, index, size in (("rows", rows, weight.shape[0]), ("cols", cols, weight.shape[1])):
        if index is not None and index.device.type == "cpu" and index.numel():
            low, high = index.aminmax()
            _check(low.item() >= 0 and high.item() < size, f"{name} must lie in [0, {size}), got {index.tolist()}")


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _packed(weight: Tensor, rows: Tensor | None, cols: Tensor | None, scale: Tensor | None) -> Tensor:
    if rows is None and cols is None and scale is None:
        return weight
    return pack_weights([weight], [rows], [cols], [scale], backend="auto")[0]


def _depthwise(packed: Tensor, groups: int) -> bool:
    """One filter a channel: those have kernels of their own on CUDA."""
    return groups > 1 and packed.shape[0] == groups and packed.shape[1] == 1


def _normalised(input: Tensor, norm_scale: Tensor | None, norm_shift: Tensor | None) -> Tensor:
    if norm_scale is None:
        return input
    scale, shift = (v.view(1, -1, 1, 1) for v in (norm_scale, norm_shift))
    return torch.addcmul(shift, input, scale).relu_().to(input.dtype)


def _sums(output: Tensor) -> Tensor:
    squares = output.to(_wide(output.dtype)).square()
    return torch.stack([part.sum((0, 2, 3), dtype=torch.float64) for part in (output, squares)])


# --- backward ---------------------------------------------------------------------------------------------------------
# need: input, weight, bias, scale, norm_scale, norm_shift, residual
@torch.library.register_fake(_NAME + "_backward")
def _(grad, grad_statistics, output, input, weight, rows, cols, scale, norm_scale, norm_shift,
      stride, padding, dilation, groups, need, backend):  # fmt: skip
    def empty(wanted: bool, like: Tensor | None, shape: Sequence[int] | None = None) -> Tensor:
        return new_empty(like, like.shape if shape is None else shape) if wanted else input.new_empty(0)

    return (
        empty(need[0], input),
        empty(need[1], weight),
        input.new_empty(grad.shape[1] if need[2] else 0),
        empty(need[3], scale),
        empty(need[4], norm_scale),
        empty(need[5], norm_shift),
        empty(need[6], input, grad.shape),
    )


def _backward(grad, grad_statistics, output, input, weight, rows, cols, scale, norm_scale, norm_shift,
              stride, padding, dilation, groups, need, backend):  # fmt: skip
    note("masked_conv2d_backward", backend)
    moves = (stride, padding, dilation)
    if grad_statistics is not None:
        grad_statistics = grad_statistics.to(_wide(input.dtype))
    whole = None  # the gradient, with what comes through the statistics
    if grad_statistics is None:
        whole = grad
    elif backend != "triton" or need[2] or need[6]:
        one, two = (part.view(1, -1, 1, 1) for part in grad_statistics)
        whole = (grad + one + 2 * output * two).to(grad.dtype)
    normed = norm_scale is not None
    need_input, need_weight = need[0] or need[4] or need[5], need[1] or need[3]
    if backend == "triton":
        from ..kernels.triton import masked_conv2d as kernels

        problem = kernels.Problem(input, weight, rows, cols, *moves)
        x = _channels_last(input)
        g, y, through = (_channels_last(whole), None, None) if whole is not None else (
            _channels_last(grad), _channels_last(output), grad_statistics.contiguous()
        )  # fmt: skip
        d_input, d_norm, d_packed = None, None, None
        rows, cols, scale, norm_scale, norm_shift = map(_contiguous, (rows, cols, scale, norm_scale, norm_shift))
        with on_device(input):
            if need_input:
                mask = (weight, rows, cols, scale)
                d_input, d_norm = kernels.input_gradient(problem, g, y, through, x, *mask, norm_scale, norm_shift)
            if need_weight:
                d_packed = kernels.weight_gradient(problem, g, y, through, x, norm_scale, norm_shift).to(weight.dtype)
    else:
        packed = _packed(weight, rows, cols, scale)
        read = _normalised(input, norm_scale, norm_shift)
        wanted = [need_input, need_weight]
        if _depthwise(packed, groups):
            d_read, d_packed = torch.ops.stamp_fast.depthwise_conv2d_backward(whole, read, packed, *moves, wanted)
        else:
            d_read, d_packed, _ = torch.ops.aten.convolution_backward(
                whole, read, packed, None, *moves, False, [0, 0], groups, [*wanted, False]
            )
        d_input, d_norm = d_read, None
        if need_input and normed:
            passed = torch.where(read <= 0, 0, d_read).to(_wide(input.dtype))
            d_norm = torch.stack([(passed * input).sum((0, 2, 3)), passed.sum((0, 2, 3))])
            d_input = (passed * norm_scale.view(1, -1, 1, 1)).to(input.dtype)
    d_weight, d_scale = None, None
    if need_weight:
        d_weight, d_scale = _unpacked(d_packed, weight, rows, cols, scale, need[1], need[3])
    found = (
        d_input.contiguous(memory_format=memory_format(input)) if need[0] else None,
        d_weight if need[1] else None,
        whole.sum((0, 2, 3)) if need[2] else None,
        d_scale if need[3] else None,
        d_norm[0].clone() if need[4] else None,
        d_norm[1].clone() if need[5] else None,
        _fresh(whole, grad).contiguous(memory_format=memory_format(input)) if need[6] else None,
    )
    return tuple(input.new_empty(0) if value is None else value for value in found)


def _fresh(tensor: Tensor, argument: Tensor) -> Tensor:
    """An operator may not return what it was given."""
    return tensor.clone() if tensor is argument else tensor


def _unpacked(grad, weight, rows, cols, scale, need_weight: bool, need_scale: bool) -> tuple[Tensor, Tensor]:
    """Gradients of the dense weight and of the scale from that of the packed weight."""
    grad = grad.contiguous(memory_format=memory_format(weight))
    absent = weight.new_empty(0)
    if rows is None and cols is None and scale is None:
        return grad, absent
    no_index = torch.empty(0, dtype=torch.int64, device=weight.device)
    index = [no_index if i is None else i for i in (rows, cols)]
    (d_weight,), (d_scale,) = torch.ops.stamp_fast.pack_weights_backward(
        [grad], [weight], [index[0]], [index[1]], [absent if scale is None else scale], [need_weight], [need_scale]
    )
    return d_weight, d_scale


for _device in ("cpu", "cuda"):
    torch.library.impl(_NAME, _device)(_forward)
    torch.library.impl(_NAME + "_backward", _device)(_backward)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    input, weight, _, rows, cols, scale, norm_scale, norm_shift, _, *rest = inputs
    *ctx.moves, statistics, ctx.backend = rest
    saved = output[0] if statistics else None
    ctx.save_for_backward(saved, input, weight, rows, cols, scale, norm_scale, norm_shift)
    if not statistics:
        ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _autograd_backward(ctx: Any, grad: Tensor | None, grad_statistics: Tensor | None) -> tuple:
    output, *saved = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    need = [wanted[i] for i in (0, 1, 2, 5, 6, 7, 8)]
    if grad is None and grad_statistics is None:
        return (None,) * 15
    if grad is None:
        grad = torch.zeros_like(output)
    found = torch.ops.stamp_fast.masked_conv2d_backward(
        grad, grad_statistics, output if grad_statistics is not None else None, *saved, *ctx.moves, need, ctx.backend
    )
    d_input, d_weight, d_bias, d_scale, d_norm_scale, d_norm_shift, d_residual = (
        value if n else None for value, n in zip(found, need, strict=True)
    )
    masks = (None, None, d_scale)
    return (d_input, d_weight, d_bias, *masks, d_norm_scale, d_norm_shift, d_residual, *(None,) * 6)


torch.library.register_autograd(_NAME, _autograd_backward, setup_context=_setup_context)
differentiable_once("masked_conv2d_backward")
