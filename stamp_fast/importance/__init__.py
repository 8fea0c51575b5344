"""How important each channel class is: one score per class, higher = keep.

Every function returns a float32 CPU tensor of shape [graph.num_classes]; `graph.groups[i].classes` is a group's slice.
"""

from .scores import bn_scale, magnitude, random, taylor

__all__ = ["bn_scale", "magnitude", "random", "taylor"]
