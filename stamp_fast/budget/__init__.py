"""How much of the network may stay, and the choice of channels that meets it."""

from .budget import Budget, check_budget, check_round_to, minimum_width

__all__ = ["Budget", "check_budget", "check_round_to", "minimum_width"]
