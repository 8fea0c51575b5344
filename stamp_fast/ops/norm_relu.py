"""The last steps of conv, batch norm, ReLU: scale, shift, add what skipped the block, rectify."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import config
from . import _reference
from ._backend import choose, note, on_device
from ._tensors import differentiable_once, memory_format, new_empty

_NAME = "stamp_fast::norm_relu"


def norm_relu(
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    *,
    backend: config.Backend | None = None,
) -> Tensor:
    """`relu(input * scale + shift + residual)`, channel by channel; differentiable once in all four.

    Args:
        input: (n, c, h, w), float32, float64, bfloat16 or float16. The result keeps dtype and memory format.
        scale, shift: (c,), float32 (float64 for float64).
        residual: like input.
        backend: see `stamp_fast.config`; None: what is set there.

    Raises:
        ArgumentError: the backend cannot take this call.
        RuntimeError: an argument has the wrong shape, dtype or device; the message names it.
    """
    if residual is not None:
        residual = residual.to(input.dtype)
    chosen = choose("norm_relu", input, backend, has_triton=True)
    if chosen == "reference":
        _check(input, scale, shift, residual)
        note("norm_relu", chosen)
        return _reference.norm_relu(input, scale, shift, residual)
    return torch.ops.stamp_fast.norm_relu(input, scale, shift, residual, chosen)


def _check(input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> None:
    torch._check(input.ndim == 4, lambda: f"norm_relu: input must have 4 dimensions, got {tuple(input.shape)}")
    wide = torch.promote_types(input.dtype, torch.float32)
    for name, tensor, shape, dtype in (
        ("scale", scale, input.shape[1:2], wide),
        ("shift", shift, input.shape[1:2], wide),
        ("residual", residual, input.shape, input.dtype),
    ):
        if tensor is not None:
            fits = tensor.shape == shape and tensor.dtype == dtype and tensor.device == input.device
            got = tuple(tensor.shape), tensor.dtype, tensor.device
            wanted = tuple(shape), dtype, input.device
            torch._check(fits, lambda n=name, w=wanted, g=got: f"norm_relu: {n} must have {w}, got {g}")


@torch.library.register_fake(_NAME)
def _(input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, backend: str) -> Tensor:
    _check(input, scale, shift, residual)
    return new_empty(input, input.shape)


@torch.library.register_fake(_NAME + "_backward")
def _(grad: Tensor, output: Tensor, input: Tensor, scale: Tensor, residual: bool, backend: str) -> tuple:
    like = new_empty(input, input.shape)
    passed = torch.empty_like(like) if residual else input.new_empty(0)
    return like, torch.empty_like(scale), torch.empty_like(scale), passed


def _forward(input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, backend: str) -> Tensor:
    _check(input, scale, shift, residual)
    note("norm_relu", backend)
    if backend == "triton":
        from ..kernels.triton import norm_relu as kernels

        last = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in (input, residual)]
        with on_device(input):
            output = kernels.norm_relu(last[0], scale.contiguous(), shift.contiguous(), last[1])
    else:
        output = _reference.norm_relu(input, scale, shift, residual)
    return output.contiguous(memory_format=memory_format(input))


def _backward(grad: Tensor, output: Tensor, input: Tensor, scale: Tensor, residual: bool, backend: str) -> tuple:
    note("norm_relu_backward", backend)
    form = memory_format(input)
    if backend == "triton":
        from ..kernels.triton import norm_relu as kernels

        last = (t.contiguous(memory_format=torch.channels_last) for t in (grad, output, input))
        with on_device(input):
            d_input, d_norm, d_residual = kernels.norm_relu_backward(*last, scale.contiguous(), residual)
        d_scale, d_shift = d_norm.unbind()
    else:
        passed = torch.where(output <= 0, 0, grad)  # NaN passes
        wide = passed.to(scale.dtype)
        d_scale, d_shift = (wide * input).sum((0, 2, 3)), wide.sum((0, 2, 3))
        d_input, d_residual = (wide * scale.view(1, -1, 1, 1)).to(input.dtype), passed
    return (
        d_input.contiguous(memory_format=form),
        d_scale.clone(),
        d_shift.clone(),
        d_residual.contiguous(memory_format=form) if residual else input.new_empty(0),
    )


for _device in ("cpu", "cuda"):
    torch.library.impl(_NAME, _device)(_forward)
    torch.library.impl(_NAME + "_backward", _device)(_backward)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    input, scale, _, _, ctx.backend = inputs
    ctx.save_for_backward(output, input, scale)


def _autograd_backward(ctx: Any, grad: Tensor) -> tuple:
    *leaves, needs_residual, _ = ctx.needs_input_grad
    found = torch.ops.stamp_fast.norm_relu_backward(grad, *ctx.saved_tensors, needs_residual, ctx.backend)
    return (*(v if n else None for v, n in zip(found, (*leaves, needs_residual), strict=True)), None)


torch.library.register_autograd(_NAME, _autograd_backward, setup_context=_setup_context)
differentiable_once("norm_relu_backward")
