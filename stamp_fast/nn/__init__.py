"""Layers of torch.nn whose channels can be masked: the same constructors, the same state_dict keys."""

from .masked_conv2d import MaskedConv2d
from .masked_conv_bn_relu import MaskedConvBNReLU2d
from .masked_linear import MaskedLinear

__all__ = ["MaskedConv2d", "MaskedConvBNReLU2d", "MaskedLinear"]
