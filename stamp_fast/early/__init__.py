"""Early pruning: cuts a network while it trains, once its architecture has come to rest (arXiv 2110.12007)."""

from .early_pruner import EarlyPruner, cut_as_in
from .indicator import indicator, settled, similarity
from .scan import Scan, scan

__all__ = ["EarlyPruner", "Scan", "cut_as_in", "indicator", "scan", "settled", "similarity"]
