"""The Early Pruning Indicator: how still the architecture of the dominant sub-network has become.

"When to Prune? A Policy towards Early Structural Pruning" (Shen et al. 2022, arXiv 2110.12007). Of a sub-network only
the number of neurons that stay in each layer counts, not which ones.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ..errors import ArgumentError

THRESHOLDS = {"magnitude": 0.983, "taylor": 0.944}  # the paper's, one for all networks and ratios


def similarity(n1: Sequence[int], n2: Sequence[int]) -> float:
    """Psi of two sub-networks of one network, in [0, 1] (equations 4 and 5).

    Args:
        n1, n2: neurons that stay in each layer.

    Raises:
        ArgumentError: not the same number of layers, none, or a count below 0.
    """
    n1, n2 = list(n1), list(n2)
    if len(n1) != len(n2) or not n1:
        raise ArgumentError(f"similarity: needs counts of the same layers, got {len(n1)} and {len(n2)} of them")
    if min(*n1, *n2) < 0:
        raise ArgumentError(f"similarity: a layer cannot keep fewer than 0 neurons, got {min(*n1, *n2)}")
    return 1 - statistics.fmean(abs(a - b) / (a + b) if a + b else 0.0 for a, b in zip(n1, n2, strict=True))


def indicator(history: Sequence[Sequence[int]], window: int = 5) -> float:
    """EPI of the last sub-network: its mean similarity to the `window` before it, or to as many as there are (eq. 6).

    Args:
        history: the sub-network of every epoch so far, each as the neurons that stay in each layer.

    Returns:
        In [0, 1]; NaN where there is no sub-network before the last.

    Raises:
        ArgumentError: an empty history, or a window below 1.
    """
    check_window(window)
    if not history:
        raise ArgumentError("indicator: needs the sub-network of at least one epoch")
    *before, last = history
    return statistics.fmean(similarity(last, n) for n in before[-window:]) if before else float("nan")


def settled(indicators: Sequence[float], threshold: float, window: int = 5) -> bool:
    """The trigger: the last EPI is at least the threshold, and at least each of the `window` before it.

    Args:
        indicators: of every epoch so far. Until the last one is that of a whole window nothing has settled.
    """
    check_window(window)
    if len(indicators) <= window:
        return False
    last = indicators[-1]
    # The first of all is NaN: there was nothing before it.
    return last >= threshold and not any(last < before for before in indicators[-window - 1 : -1])


def check_window(window: int) -> None:
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise ArgumentError(f"window: must be a whole number of at least 1, got {window!r}")
