"""Statistics of the activations at the places where channels are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..graph import _record
from ..graph._align import Aligned
from ..graph._record import Ref

if TYPE_CHECKING:
    from ..graph import ChannelGraph


def reader_means(graph: ChannelGraph, inputs: Any) -> torch.Tensor:
    """Per class, the mean activation that its readers see in one eval-mode forward; NaN where nothing reads it."""
    mode = _Means(graph)
    _record.evaluate(graph.model, inputs, mode)
    return mode.sums / mode.counts


class _Means(Aligned):
    def __init__(self, graph: ChannelGraph) -> None:
        super().__init__(graph, needed=set())  # where the forward takes another road, what was seen is still right
        self.sums = torch.zeros(graph.num_classes, dtype=torch.float32)
        self.counts = torch.zeros(graph.num_classes, dtype=torch.float32)
        self.readers = {read.op for read in graph._core.reads}

    def on_call(self, op: int, func, args: tuple, kwargs: dict, shift: int = 0):
        if op in self.readers:
            self._look(self.graph.recording.calls[op].args[max(0, shift) :], args[max(0, -shift) :])
        return func(*args, **kwargs)

    def _look(self, recorded: tuple, args: tuple) -> None:
        for ref, value in zip(recorded, args, strict=False):
            if not isinstance(ref, Ref) or not self.graph.is_activation(ref) or not value.is_floating_point():
                continue
            for dim in range(value.dim()):
                axis = self.graph._core.axis_of(ref, dim)
                if axis < 0:
                    continue
                classes = torch.from_numpy(self.graph._core.axes[axis][0]).long()
                if classes.numel() != value.shape[dim]:
                    continue
                live = classes >= 0
                means = value.movedim(dim, 0).flatten(1).float().mean(1).cpu()
                self.sums.index_add_(0, classes[live], means[live])
                self.counts.index_add_(0, classes[live], torch.ones(int(live.sum()), dtype=torch.float32))
