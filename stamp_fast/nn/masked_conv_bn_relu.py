from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from ..ops import norm_relu
from ._mask import Channels
from .masked_conv2d import MaskedConv2d


class Unrectified(NamedTuple):
    """What a `MaskedConvBNReLU2d` computes before batch norm and ReLU, with the batch norm's scale and shift.

    The next `MaskedConvBNReLU2d` normalises and rectifies it as it reads: the activation is never written.
    """

    value: Tensor
    scale: Tensor
    shift: Tensor


class MaskedConvBNReLU2d(nn.Sequential):
    """`Sequential(conv, bn, relu)` in fewer passes over the activations, with live channels only.

    The convolution brings the sums that the batch norm needs along with its output; one pass more normalises, adds a
    residual, and rectifies. Keys of the state_dict are those of `nn.Sequential(nn.Conv2d, nn.BatchNorm2d, nn.ReLU)`.

    Args:
        conv: its parameters are taken over; a plain `nn.Conv2d` becomes a `MaskedConv2d`.
        bn: of the convolution's output channels.
    """

    def __init__(self, conv: nn.Conv2d, bn: nn.BatchNorm2d, relu: nn.ReLU | None = None) -> None:
        _check_parts(conv, bn, relu)
        if bn.num_features != conv.out_channels:
            raise ArgumentError(
                f"MaskedConvBNReLU2d: bn must be of the convolution's {conv.out_channels} channels, got "
                f"{bn.num_features}"
            )
        super().__init__(_masked(conv), bn, nn.ReLU() if relu is None else relu)

    def set_mask(
        self, in_channels: Channels = None, out_channels: Channels = None, scale: Tensor | None = None
    ) -> None:
        """Replaces the mask; see `MaskedConv2d.set_mask`."""
        self[0].set_mask(in_channels, out_channels, scale)

    def forward(
        self, input: Tensor | Unrectified, residual: Tensor | None = None, unrectified: bool = False
    ) -> Tensor | Unrectified:
        """(n, o, h', w') of the live channels.

        Args:
            input: (n, i, h, w), or what the layer before gave with `unrectified`.
            residual: (n, o, h', w'), added before the ReLU.
            unrectified: leaves batch norm and ReLU to the next `MaskedConvBNReLU2d`.

        Raises:
            ArgumentError: a residual cannot be left to the next layer.
        """
        conv = self[0]
        if unrectified and residual is not None:
            raise ArgumentError("MaskedConvBNReLU2d: a residual is added here, so unrectified=True cannot be")
        norm = None
        if isinstance(input, Unrectified):
            norm = input.scale, input.shift
            input = input.value
            if input.shape[1] != (conv.in_channels if conv.live_in is None else conv.live_in.numel()):
                raise ArgumentError(
                    "MaskedConvBNReLU2d: an unrectified input must hold the live channels of this layer only, got "
                    f"{input.shape[1]}"
                )
        else:
            input = conv._compact(input, 1, conv.in_channels)
        from_batch = self[1].training or self[1].running_mean is None
        value = conv.computed(input, norm=norm, statistics=from_batch)
        value, sums = value if from_batch else (value, None)
        scale, shift = self._scale_and_shift(sums, value)
        return Unrectified(value, scale, shift) if unrectified else norm_relu(value, scale, shift, residual)

    def _scale_and_shift(self, sums: Tensor | None, value: Tensor) -> tuple[Tensor, Tensor]:
        """What batch norm multiplies by and adds, float32 (float64) of the live channels; follows its statistics."""
        bn, live = self[1], self[0].live_out
        if sums is None:
            mean, variance = (self[0]._live(v, live) for v in (bn.running_mean, bn.running_var))
        else:
            count = value.numel() // max(1, value.shape[1])
            if count == 1 and bn.training:
                raise ArgumentError(
                    "MaskedConvBNReLU2d: expected more than 1 value per channel in training, got an output of "
                    f"{tuple(value.shape)}"
                )
            mean = sums[0] / max(1, count)
            # Rounding may take it below zero.
            variance = (sums[1] / max(1, count) - mean.square()).clamp(min=0)
            if bn.training and bn.running_mean is not None and count > 0:
                self._follow(mean.detach(), variance.detach() * (count / max(1, count - 1)))
        wide = torch.promote_types(value.dtype, torch.float32)
        scale = torch.rsqrt(variance.to(wide) + bn.eps)
        shift = -mean.to(wide) * scale
        if bn.affine:
            weight, bias = (self[0]._live(v, live).to(wide) for v in (bn.weight, bn.bias))
            scale, shift = scale * weight, shift * weight + bias
        return scale, shift

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        bn, live = self[1], self[0].live_out
        bn.num_batches_tracked.add_(1)
        momentum = bn.momentum if bn.momentum is not None else 1.0 / bn.num_batches_tracked.to(mean.dtype)
        for running, now in ((bn.running_mean, mean), (bn.running_var, variance)):
            old = running if live is None else running.index_select(0, live)
            new = old + (now.to(running.dtype) - old) * momentum
            if live is None:
                running.copy_(new)
            else:
                running.index_copy_(0, live, new)


def _check_parts(conv: nn.Module, bn: nn.Module, relu: nn.Module | None) -> None:
    """Whatever is more than these layers would silently get lost."""
    for name, part, kinds in (
        ("conv", conv, (nn.Conv2d, MaskedConv2d)),
        ("bn", bn, (nn.BatchNorm2d,)),
        ("relu", relu, (nn.ReLU, type(None))),
    ):
        if type(part) not in kinds:
            raise ArgumentError(
                f"MaskedConvBNReLU2d: {name} must be a plain {kinds[0].__name__}, got {type(part).__name__}"
            )
        if part is not None and (part._forward_hooks or part._forward_pre_hooks or part._modules):
            raise ArgumentError(f"MaskedConvBNReLU2d: {name} has hooks or parametrizations, which would not run")


def _masked(conv: nn.Conv2d) -> MaskedConv2d:
    if isinstance(conv, MaskedConv2d):
        return conv
    masked = MaskedConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
        conv.bias is not None,
        conv.padding_mode,
        device="meta",
    )
    masked.weight, masked.bias = conv.weight, conv.bias
    return masked.train(conv.training)
