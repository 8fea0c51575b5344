"""MetaPruning: a network that makes the weights of every width, and a search for the best one (arXiv 1903.10258)."""

from .front import Front, front
from .genome import SCALES, Genome, SearchSpace
from .pruning_net import PruningNet, WeightGenerator
from .search import Scores, search

__all__ = ["SCALES", "Front", "Genome", "PruningNet", "Scores", "SearchSpace", "WeightGenerator", "front", "search"]
