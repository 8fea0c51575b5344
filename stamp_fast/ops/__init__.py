"""Native operators with their fake kernels and gradients."""

from stamp_fast.ops._convolutions import convolutions
from stamp_fast.ops.channel_saliency import ChannelSaliency, channel_saliency
from stamp_fast.ops.compact import compact_, gather
from stamp_fast.ops.depthwise_conv2d import depthwise_conv2d
from stamp_fast.ops.masked_conv2d import masked_conv2d
from stamp_fast.ops.norm_relu import norm_relu
from stamp_fast.ops.pack_weights import pack_weights

__all__ = [
    "ChannelSaliency",
    "channel_saliency",
    "compact_",
    "convolutions",
    "depthwise_conv2d",
    "gather",
    "masked_conv2d",
    "norm_relu",
    "pack_weights",
]
