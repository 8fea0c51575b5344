"""How much of the network may stay, and the choice of channels that meets it."""

from .budget import MEASURED, Budget, RoundTo, check_round_to, minimum_width, steps_of
from .meet import Promise, meet, promised

__all__ = [
    "MEASURED",
    "Budget",
    "Promise",
    "RoundTo",
    "check_round_to",
    "meet",
    "minimum_width",
    "promised",
    "steps_of",
]
