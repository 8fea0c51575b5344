from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .. import config
from ..errors import ArgumentError
from ..ops import masked_conv2d, norm_relu
from ._mask import Channels, Masked


class MaskedConv2d(nn.Conv2d, Masked):
    """`torch.nn.Conv2d` of which only live channels are computed; without a mask it is that layer.

    The parameters stay dense: what is masked gets a gradient of zero. Dead channels are never computed, and the output
    holds the live ones only (`stamp_fast.ops.masked_conv2d`).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._no_mask()

    def set_mask(
        self, in_channels: Channels = None, out_channels: Channels = None, scale: Tensor | None = None
    ) -> None:
        """Replaces the mask.

        Args:
            in_channels: live input channels, as positions or as one boolean for each; None: all. Inputs may hold all
                channels, or the live ones in that order.
            out_channels: live output channels, likewise; None: all. With groups > 1 both are None, but for a depthwise
                convolution, where the two must be the same.
            scale: one factor for each live input channel; differentiable.

        Raises:
            ArgumentError: names the argument.
        """
        if self.groups > 1 and (in_channels is not None or out_channels is not None or scale is not None):
            self._set_depthwise_mask(in_channels, out_channels, scale)
        else:
            self._set_mask((self.in_channels, self.out_channels), in_channels, out_channels, scale)

    def _set_depthwise_mask(self, in_channels: Channels, out_channels: Channels, scale: Tensor | None) -> None:
        if not self.groups == self.in_channels == self.out_channels:
            raise ArgumentError(
                f"MaskedConv2d.set_mask: with groups={self.groups} only a depthwise convolution can be masked"
            )
        both = in_channels if out_channels is None else out_channels
        found = [self._index("in_channels", channels, self.in_channels) for channels in (in_channels, both)]
        if scale is not None or (in_channels is not None and not _same(*found)):
            raise ArgumentError(
                "MaskedConv2d.set_mask: a depthwise convolution reads and emits the same channels: in_channels and "
                "out_channels must agree, and a factor belongs to the layer that reads them next"
            )
        self._set_mask((self.in_channels, self.out_channels), both, both, None)

    def forward(self, input: Tensor) -> Tensor:
        if not self.masked and config.backend in ("auto", "cpu", "cuda"):
            return super().forward(input)
        return self.computed(self._compact(input, 1, self.in_channels))

    def computed(self, input: Tensor, norm: tuple[Tensor, Tensor] | None = None, **fused: Any) -> Any:
        """The output for a compact input; `norm` and `fused`: see `ops.masked_conv2d`."""
        padding = self.padding
        if self.padding_mode != "zeros" or isinstance(padding, str):
            if norm is not None:  # the padding is of what is normalised
                input, norm = norm_relu(input, *norm), None
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=mode)
            padding = 0
        depthwise = self.groups > 1
        return masked_conv2d(
            input,
            self.weight,
            self._live(self.bias, self.live_out),
            rows=self.live_out,
            cols=None if depthwise else self.live_in,
            scale=self.mask_scale,
            norm=norm,
            stride=self.stride,
            padding=padding,
            dilation=self.dilation,
            groups=self.groups if not depthwise or self.live_out is None else self.live_out.numel(),
            **fused,
        )


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return (one is None) == (other is None) and (one is None or one.equal(other))
