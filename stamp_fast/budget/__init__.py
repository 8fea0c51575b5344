"""How much of the network may stay, and the choice of channels that meets it."""

from .budget import (
    MEASURED,
    Budget,
    RoundTo,
    absolute,
    check_round_to,
    checked_scores,
    minimum_width,
    steps_of,
    unit_of,
    written,
)
from .meet import PROMISED, Promise, meet, promised

__all__ = [
    "MEASURED",
    "PROMISED",
    "Budget",
    "Promise",
    "RoundTo",
    "absolute",
    "check_round_to",
    "checked_scores",
    "meet",
    "minimum_width",
    "promised",
    "steps_of",
    "unit_of",
    "written",
]
