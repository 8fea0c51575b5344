"""The cost of a network whose classes are kept with a probability each; differentiable."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .graph import ChannelGraph


def soft_cost(graph: ChannelGraph, unit: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Expected fraction of the dense cost, in any unit of a budget, for keep probabilities [num_classes]."""
    return SoftCost(graph, unit) if unit in ("macs", "params", "channels") else graph.cost_table.soft(unit)


class SoftCost:
    """Expected cost, relative to the dense network: product of the expected widths of every term's dims.

    Args:
        kind: "macs", "params" or "channels".
    """

    def __init__(self, graph: ChannelGraph, kind: str) -> None:
        self.widths = graph.class_channels().to(graph.device) if kind == "channels" else None
        if kind == "channels":
            return
        terms = graph._core.macs_terms if kind == "macs" else graph._core.params_terms
        axes = graph._core.axes
        classes, segments = [], []
        used = sorted({axis for _, _, dims in terms for axis in dims})
        place = {axis: i for i, axis in enumerate(used)}
        fixed = torch.zeros(len(used) + 1, dtype=torch.float32)
        fixed[-1] = 1.0  # stands for "no further dim"
        for axis in used:
            # Of several layers the first stands for all: an estimate, used for a gradient only.
            layer = torch.from_numpy(axes[axis][0]).long()
            live = layer[layer >= 0]
            fixed[place[axis]] = float((layer < 0).sum())
            classes.append(live)
            segments.append(torch.full_like(live, place[axis]))
        deepest = max((len(dims) for _, _, dims in terms), default=0)
        self.dims = torch.tensor(
            [[*(place[a] for a in dims), *[len(used)] * (deepest - len(dims))] for _, _, dims in terms]
        )
        self.constants = torch.tensor(
            [float(constant) for _, constant, _ in terms], dtype=torch.float32, device=graph.device
        )
        self.fixed = fixed.to(graph.device)
        self.classes = torch.cat(classes).to(graph.device) if classes else torch.empty(0, dtype=torch.long)
        self.segments = torch.cat(segments).to(graph.device) if segments else self.classes
        whole = torch.ones(graph.num_classes, dtype=torch.float32, device=graph.device)
        self.dense = self._products(whole)
        self.total = self._cost(whole).item()

    def _products(self, p: torch.Tensor) -> torch.Tensor:
        return self.fixed.index_add(0, self.segments, p[self.classes])[self.dims].prod(1)

    def _cost(self, p: torch.Tensor) -> torch.Tensor:
        return (self.constants * self._products(p)).sum()

    def shares(self, p: torch.Tensor) -> torch.Tensor:
        """Of every term by itself: [terms]."""
        return self._products(p) / self.dense

    def __call__(self, p: torch.Tensor) -> torch.Tensor:
        """Expected fraction of the dense cost for keep probabilities p, [num_classes]."""
        if self.widths is not None:
            return (p * self.widths).sum() / self.widths.sum()
        return self._cost(p) / self.total
