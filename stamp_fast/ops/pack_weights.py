"""Gathers and scales the live part of many tensors in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from stamp_fast import _load, config  # noqa: F401  (_load registers the operators)
from stamp_fast.ops import _reference
from stamp_fast.ops._backend import choose, note
from stamp_fast.ops._tensors import check_float, check_same_dtype, differentiable_once, new_empty


def pack_weights(
    tensors: Sequence[Tensor],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    scales: Sequence[Tensor | None],
    *,
    backend: config.Backend | None = None,
) -> list[Tensor]:
    """Packs the live rows and columns of each tensor and scales its columns.

    For tensor `i`: `out = tensors[i][rows[i]][:, cols[i]] * scales[i][None, :, None, ...]`. A tensor of one
    dimension has rows only, and its scale goes with them. Differentiable in `tensors` and `scales`. A result
    never shares memory with its tensor, and keeps its memory format (channels_last or contiguous).

    Args:
        tensors: (O, I, ...) or (O,), float32, float64, bfloat16 or float16; all on one device.
        rows: (o,) int64, kept positions along dimension 0, each at most once; None or empty keeps all.
        cols: (i,) int64, kept positions along dimension 1, each at most once; None or empty keeps all, and is
            the only choice for a tensor of one dimension.
        scales: (i,), or (o,) for a tensor of one dimension: one factor for each packed column, of the
            tensor's dtype; None or empty scales nothing.
        backend: see `stamp_fast.config`; None: what is set there. Without the CUDA library CUDA tensors take the
            reference.

    Returns:
        The packed tensors, (o, i, ...) or (o,).

    Raises:
        ArgumentError: the backend cannot take this call.
        RuntimeError: An argument has the wrong length, shape, dtype or device, or an index is out of range
            (on CUDA the kernel is stopped by it).
    """
    tensors = list(tensors)
    if not tensors:
        return []
    chosen = choose("pack_weights", tensors[0], backend)
    if chosen == "reference":
        note("pack_weights", chosen)
        return _reference.pack_weights(tensors, rows, cols, scales)
    no_index = torch.empty(0, dtype=torch.int64, device=tensors[0].device)
    no_scale = {tensor.dtype: tensor.new_empty(0) for tensor in tensors}
    packed = torch.ops.stamp_fast.pack_weights(
        tensors,
        [no_index if index is None else index for index in rows],
        [no_index if index is None else index for index in cols],
        [no_scale[tensor.dtype] if scale is None else scale for tensor, scale in zip(tensors, scales, strict=True)],
    )
    note("pack_weights", chosen)
    return packed


def _check_length(name: str, got: int, wanted: int) -> None:
    torch._check(got == wanted, lambda: f"pack_weights: {name} must have the length of tensors, {wanted}, got {got}")


def _check_index(name: str, index: Tensor) -> None:
    torch._check(index.ndim == 1, lambda: f"pack_weights: {name} must have 1 dimension, got {tuple(index.shape)}")
    torch._check(index.dtype == torch.int64, lambda: f"pack_weights: {name} must be int64, got {index.dtype}")


def _packed_shape(i: int, tensor: Tensor, row: Tensor, col: Tensor, scale: Tensor) -> list[int]:
    """Shape of packed tensor `i`, with the checks of csrc/pack_weights.h that need no data."""
    ndim = tensor.ndim
    torch._check(ndim >= 1, lambda: f"pack_weights: tensors[{i}] must have at least 1 dimension, got 0")
    check_float("pack_weights", f"tensors[{i}]", tensor)
    _check_index(f"rows[{i}]", row)
    _check_index(f"cols[{i}]", col)
    torch._check(
        ndim > 1 or col.numel() == 0,
        lambda: f"pack_weights: cols[{i}] must be empty for a tensor of 1 dimension, got {col.numel()}",
    )
    shape = list(tensor.shape)
    if row.numel():
        shape[0] = row.numel()
    if col.numel():
        shape[1] = col.numel()
    wanted = shape[1 if ndim > 1 else 0]
    torch._check(
        scale.ndim == 1 and scale.numel() in (0, wanted),
        lambda: f"pack_weights: scales[{i}] must have {wanted} elements, got {tuple(scale.shape)}",
    )
    check_same_dtype("pack_weights", f"scales[{i}]", scale, f"tensors[{i}]", tensor)
    return shape


@torch.library.register_fake("stamp_fast::pack_weights")
def _(tensors: list[Tensor], rows: list[Tensor], cols: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    for name, arguments in (("rows", rows), ("cols", cols), ("scales", scales)):
        _check_length(name, len(arguments), len(tensors))
    items = zip(tensors, rows, cols, scales, strict=True)
    return [new_empty(item[0], _packed_shape(i, *item)) for i, item in enumerate(items)]


@torch.library.register_fake("stamp_fast::pack_weights_backward")
def _(
    grads: list[Tensor],
    tensors: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    scales: list[Tensor],
    need_tensors: list[bool],
    need_scales: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    tensor_grads = [
        new_empty(tensor, tensor.shape) if need else tensor.new_empty(0)
        for tensor, need in zip(tensors, need_tensors, strict=True)
    ]
    scale_grads = [scale.new_empty(scale.shape if need else 0) for scale, need in zip(scales, need_scales, strict=True)]
    return tensor_grads, scale_grads


# "default" serves every device without a native kernel: a GPU where the CUDA library is not built.
@torch.library.impl("stamp_fast::pack_weights", "default")
def _(tensors: list[Tensor], rows: list[Tensor], cols: list[Tensor], scales: list[Tensor]) -> list[Tensor]:
    items = zip(tensors, rows, cols, scales, strict=True)
    shapes = [_packed_shape(i, *item) for i, item in enumerate(items)]
    packed = _reference.pack_weights(tensors, rows, cols, scales)
    outputs = [new_empty(tensor, shape) for tensor, shape in zip(tensors, shapes, strict=True)]
    return [output.copy_(values) for output, values in zip(outputs, packed, strict=True)]


@torch.library.impl("stamp_fast::pack_weights_backward", "default")
def _(
    grads: list[Tensor],
    tensors: list[Tensor],
    rows: list[Tensor],
    cols: list[Tensor],
    scales: list[Tensor],
    need_tensors: list[bool],
    need_scales: list[bool],
) -> tuple[list[Tensor], list[Tensor]]:
    tensor_grads, scale_grads = _reference.pack_weights_backward(grads, tensors, rows, cols, scales)
    return (
        [
            new_empty(tensor, tensor.shape).copy_(grad) if need else tensor.new_empty(0)
            for tensor, grad, need in zip(tensors, tensor_grads, need_tensors, strict=True)
        ],
        [grad if need else grad.new_empty(0) for grad, need in zip(scale_grads, need_scales, strict=True)],
    )


def _setup_context(ctx, inputs, output) -> None:
    tensors, rows, cols, scales = inputs
    ctx.count = len(tensors)
    ctx.save_for_backward(*tensors, *rows, *cols, *scales)


def _backward(ctx, grads: list[Tensor | None]):
    n = ctx.count
    saved = ctx.saved_tensors
    tensors, rows, cols, scales = (list(saved[k * n : (k + 1) * n]) for k in range(4))
    need_tensors, need_scales = ctx.needs_input_grad[0], ctx.needs_input_grad[3]
    live = [i for i in range(n) if grads[i] is not None and (need_tensors[i] or need_scales[i])]
    tensor_grads: list[Tensor | None] = [None] * n
    scale_grads: list[Tensor | None] = [None] * n
    if live:
        d_tensors, d_scales = torch.ops.stamp_fast.pack_weights_backward(
            [grads[i] for i in live],
            [tensors[i] for i in live],
            [rows[i] for i in live],
            [cols[i] for i in live],
            [scales[i] for i in live],
            [need_tensors[i] for i in live],
            [need_scales[i] for i in live],
        )
        for i, d_tensor, d_scale in zip(live, d_tensors, d_scales, strict=True):
            tensor_grads[i] = d_tensor if need_tensors[i] else None
            scale_grads[i] = d_scale if need_scales[i] else None
    return tensor_grads, [None] * n, [None] * n, scale_grads


torch.library.register_autograd("stamp_fast::pack_weights", _backward, setup_context=_setup_context)
differentiable_once("pack_weights_backward")
