"""Native operators with their fake kernels and gradients."""

from stamp_fast.ops.pack_weights import pack_weights

__all__ = ["pack_weights"]
