"""Which channels of a layer live."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import ArgumentError

Channels = Tensor | Sequence[int] | Sequence[bool] | None


class Masked(nn.Module):
    """Holds the mask in buffers that are no part of the state_dict: they move and are copied with the layer."""

    live_in: Tensor | None
    live_out: Tensor | None
    mask_scale: Tensor | None

    def _no_mask(self) -> None:
        for name in ("live_in", "live_out", "mask_scale"):
            self.register_buffer(name, None, persistent=False)

    def _set_mask(self, sizes: tuple[int, int], in_channels: Channels, out_channels: Channels, scale: Tensor | None):
        live_in = self._index("in_channels", in_channels, sizes[0])
        live_out = self._index("out_channels", out_channels, sizes[1])
        live = sizes[0] if live_in is None else live_in.numel()
        where = f"{type(self).__name__}.set_mask"
        if live_in is not None and live == sizes[0]:
            raise ArgumentError(
                f"{where}: in_channels keeps all {live} channels in another order: no input could be told from one in "
                "that order; leave it out"
            )
        if scale is not None and (not isinstance(scale, Tensor) or tuple(scale.shape) != (live,)):
            got = tuple(scale.shape) if isinstance(scale, Tensor) else type(scale).__name__
            raise ArgumentError(
                f"{where}: scale must be a tensor with one factor for each of the {live} live input channels, got {got}"
            )
        # Into the buffers by hand: an nn.Parameter would become one of the layer's.
        self._buffers.update(live_in=live_in, live_out=live_out, mask_scale=scale)

    def _index(self, name: str, channels: Channels, size: int) -> Tensor | None:
        if channels is None:
            return None
        where = f"{type(self).__name__}.set_mask: {name}"
        device = self.weight.device
        if device.type == "meta":
            raise ArgumentError(f"{where}: the layer lies on the meta device, where positions have no value")
        try:
            index = torch.as_tensor(channels, device=device).clone()
        except (TypeError, ValueError, RuntimeError):
            index = torch.empty(0)
        if index.dtype == torch.bool:
            if tuple(index.shape) != (size,):
                raise ArgumentError(f"{where} must be {size} booleans, got {tuple(index.shape)}")
            index = index.nonzero().flatten()
        if index.ndim != 1 or index.is_floating_point() or index.is_complex() or index.numel() == 0:
            raise ArgumentError(f"{where} must be positions or booleans in one dimension, at least one, got {channels}")
        index = index.to(torch.int64)
        if int(index.min()) < 0 or int(index.max()) >= size or index.unique().numel() < index.numel():
            raise ArgumentError(f"{where} must be different positions in [0, {size}), got {index.tolist()}")
        return None if torch.equal(index, torch.arange(size, device=device)) else index

    @property
    def masked(self) -> bool:
        """A mask is set."""
        return self.live_in is not None or self.live_out is not None or self.mask_scale is not None

    def _compact(self, input: Tensor, dim: int, size: int) -> Tensor:
        """The live channels of an input that holds them all; an input that holds the live ones only as it is."""
        if self.live_in is None or input.shape[dim] == self.live_in.numel():
            return input
        if input.shape[dim] != size:
            raise ArgumentError(
                f"{type(self).__name__}: the input must have {size} channels, or the {self.live_in.numel()} live ones, "
                f"got {tuple(input.shape)}"
            )
        return input.index_select(dim, self.live_in)

    @staticmethod
    def _live(values: Tensor | None, index: Tensor | None) -> Tensor | None:
        return values if values is None or index is None else values.index_select(0, index)
