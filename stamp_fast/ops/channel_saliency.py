"""What an activation and its gradient say of each channel, in one pass over both."""

from typing import NamedTuple

import torch
from torch import Tensor

from stamp_fast import _load, config  # noqa: F401  (_load registers the operators)
from stamp_fast.ops import _reference
from stamp_fast.ops._backend import choose, note
from stamp_fast.ops._tensors import check_float, check_same_dtype


class ChannelSaliency(NamedTuple):
    """One (C,) tensor each, float64 for float64 activations and float32 for all others.

    With s = the sum of activation * gradient over the positions of one image:
    """

    taylor: Tensor  # sum of |s| over the images
    fisher: Tensor  # half the sum of s^2 over the images
    mean: Tensor  # of the activation, over images and positions
    zero_fraction: Tensor  # share of the activation's elements that are exactly zero


def channel_saliency(
    activation: Tensor, gradient: Tensor, dim: int = 1, *, backend: config.Backend | None = None
) -> ChannelSaliency:
    """Sums up what an activation and its gradient say of each channel.

    The first dimension counts images, unless `dim` is the first one: then all is one image. Contiguous and
    channels_last tensors are read where they lie, once; others are copied first, and a gradient in another memory
    format than the activation's is brought to it. Not differentiable. A result does not depend on the number of
    threads.

    Args:
        activation: (N, ..., C, ...), float32, float64, bfloat16 or float16.
        gradient: of the loss with respect to the activation; of its shape, dtype and device.
        dim: which dimension the channels lie along; negative counts from the end.
        backend: see `stamp_fast.config`; None: what is set there. Without the CUDA library CUDA tensors take the
            reference.

    Returns:
        Four tensors of one element per channel. What is summed over nothing, or is a mean of nothing, is 0.

    Raises:
        ArgumentError: the backend cannot take this call.
        RuntimeError: An argument has the wrong shape, dtype or device; or a backward pass comes here.
    """
    chosen = choose("channel_saliency", activation, backend)
    if chosen == "reference":
        _empty(activation, gradient, dim)  # the checks
        found = _Plain.apply(activation, gradient, dim)
    else:
        found = torch.ops.stamp_fast.channel_saliency(activation, gradient, dim)
    note("channel_saliency", chosen)
    return ChannelSaliency(*found.unbind())


class _Plain(torch.autograd.Function):
    """The reference, which would be differentiable."""

    @staticmethod
    def forward(ctx, activation: Tensor, gradient: Tensor, dim: int) -> Tensor:
        return _reference.channel_saliency(activation, gradient, dim)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _backward(ctx, grad)


def _empty(activation: Tensor, gradient: Tensor, dim: int) -> Tensor:
    """The result without values, with the checks of csrc/channel_saliency.h."""
    op, ndim, shape = "channel_saliency", activation.ndim, activation.shape
    check_float(op, "activation", activation)
    torch._check(ndim >= 1, lambda: f"{op}: activation must have at least 1 dimension, got 0")
    check_same_dtype(op, "gradient", gradient, "activation", activation)
    torch._check(
        gradient.shape == shape,
        lambda: f"{op}: gradient must have the shape of activation, {tuple(shape)}, got {tuple(gradient.shape)}",
    )
    torch._check(-ndim <= dim < ndim, lambda: f"{op}: dim must lie in [{-ndim}, {ndim}), got {dim}")
    return activation.new_empty((4, shape[dim]), dtype=torch.promote_types(activation.dtype, torch.float32))


@torch.library.register_fake("stamp_fast::channel_saliency")
def _(activation: Tensor, gradient: Tensor, dim: int) -> Tensor:
    return _empty(activation, gradient, dim)


# "default" serves every device without a native kernel: a GPU where the CUDA library is not built.
@torch.library.impl("stamp_fast::channel_saliency", "default")
def _(activation: Tensor, gradient: Tensor, dim: int) -> Tensor:
    _empty(activation, gradient, dim)
    return _reference.channel_saliency(activation, gradient, dim)


def _backward(ctx, grad: Tensor):
    raise RuntimeError("channel_saliency: is not differentiable; detach its result, or call it under torch.no_grad()")


torch.library.register_autograd("stamp_fast::channel_saliency", _backward)
