"""How much of the network may stay, and the choice of channels that meets it."""

from .budget import Budget

__all__ = ["Budget"]
