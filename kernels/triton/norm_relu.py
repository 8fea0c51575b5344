"""relu(x * scale + shift + residual) over channels-last activations, and its gradients in one pass."""

import torch
import triton
import triton.language as tl

_BLOCK_POSITIONS, _BLOCK_CHANNELS = 64, 64
_BLOCKS = 1024  # the most parts that the positions are cut into for the gradients of scale and shift


@triton.jit
def _forward_kernel(
    x_ptr, scale_ptr, shift_ptr, residual_ptr, y_ptr, positions, channels, RESIDUAL: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = (tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    c = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    inside = (m < positions) & (c < channels)
    at = m * channels + c
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    value = value * tl.load(scale_ptr + c, mask=c < channels, other=0.0)
    value += tl.load(shift_ptr + c, mask=c < channels, other=0.0)
    if RESIDUAL:
        value += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        y_ptr + at, tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL).to(y_ptr.dtype.element_ty), mask=inside
    )


@triton.jit
def _backward_kernel(
    g_ptr, y_ptr, x_ptr, scale_ptr, dx_ptr, d_residual_ptr, partial_ptr, positions, per_block, channels,
    RESIDUAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    c = (tl.program_id(1) * BN + tl.arange(0, BN))[None, :]
    c_ok = c < channels
    scale = tl.load(scale_ptr + c, mask=c_ok, other=0.0)
    d_scale = tl.zeros((BM, BN), dtype=tl.float32)
    d_shift = tl.zeros((BM, BN), dtype=tl.float32)
    first = tl.program_id(0).to(tl.int64) * per_block
    for m0 in range(0, per_block, BM):
        m = (first + m0 + tl.arange(0, BM))[:, None]
        inside = (m < positions) & (m < first + per_block) & c_ok
        at = m * channels + c
        y = tl.load(y_ptr + at, mask=inside, other=0.0)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.where(inside & ~(y <= 0), g, 0.0)  # NaN passes
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        d_scale += g * x
        d_shift += g
        tl.store(dx_ptr + at, (g * scale).to(dx_ptr.dtype.element_ty), mask=inside)
        if RESIDUAL:
            tl.store(d_residual_ptr + at, g.to(d_residual_ptr.dtype.element_ty), mask=inside)
    place = partial_ptr + tl.program_id(0).to(tl.int64) * 2 * channels + c
    tl.store(place, tl.sum(d_scale, 0)[None, :], mask=c_ok)
    tl.store(place + channels, tl.sum(d_shift, 0)[None, :], mask=c_ok)


def norm_relu(x, scale, shift, residual):
    """x and residual: [images, channels, h, w], channels_last; scale and shift: float32 [channels]."""
    y = torch.empty_like(x, memory_format=torch.channels_last)
    positions, channels = x.numel() // max(1, x.shape[1]), x.shape[1]
    if x.numel():
        grid = (triton.cdiv(positions, _BLOCK_POSITIONS), triton.cdiv(channels, _BLOCK_CHANNELS))
        _forward_kernel[grid](
            x, scale, shift, residual, y, positions, channels, RESIDUAL=residual is not None,
            BM=_BLOCK_POSITIONS, BN=_BLOCK_CHANNELS,
        )  # fmt: skip
    return y


def norm_relu_backward(grad, y, x, scale, residual: bool):
    """Gradients of x, of scale and shift (float32 [2, channels]), and of the residual or None."""
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    d_residual = torch.empty_like(dx) if residual else None
    positions, channels = x.numel() // max(1, x.shape[1]), x.shape[1]
    if x.numel() == 0:
        return dx, torch.zeros((2, channels), dtype=torch.float32, device=x.device), d_residual
    per_block = triton.cdiv(triton.cdiv(positions, _BLOCKS), _BLOCK_POSITIONS) * _BLOCK_POSITIONS
    blocks = triton.cdiv(positions, per_block)
    partial = torch.empty((blocks, 2, channels), dtype=torch.float32, device=x.device)
    _backward_kernel[(blocks, triton.cdiv(channels, _BLOCK_CHANNELS))](
        grad, y, x, scale, dx, d_residual, partial, positions, per_block, channels, RESIDUAL=residual,
        BM=_BLOCK_POSITIONS, BN=_BLOCK_CHANNELS,
    )  # fmt: skip
    return dx, partial.sum(0), d_residual
