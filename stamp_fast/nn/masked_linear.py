from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..ops import pack_weights
from ._mask import Channels, Masked


class MaskedLinear(nn.Linear, Masked):
    """`torch.nn.Linear` of which only live features are computed; without a mask it is that layer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._no_mask()

    def set_mask(
        self, in_features: Channels = None, out_features: Channels = None, scale: Tensor | None = None
    ) -> None:
        """Replaces the mask; see `MaskedConv2d.set_mask`."""
        self._set_mask((self.in_features, self.out_features), in_features, out_features, scale)

    def forward(self, input: Tensor) -> Tensor:
        input = self._compact(input, -1, self.in_features)
        weight = self.weight
        if self.masked:
            scale = None if self.mask_scale is None else self.mask_scale.to(weight.dtype)
            (weight,) = pack_weights([weight], [self.live_out], [self.live_in], [scale])
        return F.linear(input, weight, self._live(self.bias, self.live_out))
