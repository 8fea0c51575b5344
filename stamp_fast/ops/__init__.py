"""Native operators with their fake kernels and gradients."""

from stamp_fast.ops.channel_saliency import ChannelSaliency, channel_saliency
from stamp_fast.ops.depthwise_conv2d import depthwise_conv2d
from stamp_fast.ops.pack_weights import pack_weights

__all__ = ["ChannelSaliency", "channel_saliency", "depthwise_conv2d", "pack_weights"]
