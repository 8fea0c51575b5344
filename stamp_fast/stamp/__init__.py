"""STAMP: a mask conditioned on the data set, learned jointly with the weights in a few steps (arXiv 2006.12139)."""

from .adapt import Settings, adapt, unconditional
from .gates import BetaBernoulliGates, expected_gate, kumaraswamy_kl
from .mask_generator import MaskGenerator
from .meta_train import Schedule, meta_train
from .set_encoder import SetEncoder

__all__ = [
    "BetaBernoulliGates",
    "MaskGenerator",
    "Schedule",
    "SetEncoder",
    "Settings",
    "adapt",
    "expected_gate",
    "kumaraswamy_kl",
    "meta_train",
    "unconditional",
]
