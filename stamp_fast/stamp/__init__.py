"""STAMP: a mask conditioned on the data set, learned jointly with the weights in a few steps (arXiv 2006.12139)."""

from .adapt import adapt
from .gates import BetaBernoulliGates, expected_gate, kumaraswamy_kl

__all__ = ["BetaBernoulliGates", "adapt", "expected_gate", "kumaraswamy_kl"]
