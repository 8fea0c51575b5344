"""Statistics of the activations at the places where channels are read."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from ..graph import _record
from ..graph._align import Aligned
from ..graph._plan import swapped

if TYPE_CHECKING:
    from ..graph import ChannelGraph


def image_means(graph: ChannelGraph, inputs: Any, grad: bool = False) -> torch.Tensor:
    """Per image and class, the mean activation that the class's readers see: float32, [images, num_classes].

    One eval-mode forward for each of `inputs`, which is what a forward takes or a list of that. NaN where nothing reads
    the class. An activation whose first dim is not the batch counts as the same for all images.

    Args:
        grad: differentiable in the inputs; all activations that are read stay in memory for it.
    """
    if isinstance(inputs, list):
        return torch.cat([image_means(graph, one, grad) for one in inputs])
    images = _record.batch_size(inputs)
    mode = _Readings(graph, images, grad)
    with _copies(graph) if grad else nullcontext():
        mode.run(inputs, grad)
    sums = torch.zeros(images, graph.num_classes, dtype=torch.float32)
    counts = torch.zeros(graph.num_classes, dtype=torch.float32)
    for read, classes in mode.read:
        live = classes >= 0
        # What is computed in a dispatch mode has no gradient, so the means are taken out here.
        means = (_means(*read, images) if grad else read)[:, live.to(read[0].device)].cpu()
        sums = sums.index_add(1, classes[live], means)
        counts.index_add_(0, classes[live], torch.ones(int(live.sum()), dtype=torch.float32))
    return sums / counts


def reader_means(graph: ChannelGraph, inputs: Any) -> torch.Tensor:
    """`image_means`, averaged over the images: float32, [num_classes]."""
    return image_means(graph, inputs).mean(0)


def _copies(graph: ChannelGraph) -> AbstractContextManager:
    """Inside, copies of the parameters run in their place: later training must not touch what a backward needs."""
    parameters = {i: slot.tensor.detach().clone() for i, slot in enumerate(graph.slots) if slot.is_parameter}
    return swapped(graph.plan(graph.all_kept()), parameters)


def _means(value: torch.Tensor, dim: int, images: int) -> torch.Tensor:
    """[images, positions of dim]: mean over all else; windows and tokens may be folded into the first dim."""
    last = value.float().movedim(dim, -1)
    if dim == 0 or value.shape[0] % images:
        return last.reshape(-1, last.shape[-1]).mean(0).expand(images, -1)
    return last.reshape(images, -1, last.shape[-1]).mean(1)


class _Readings(Aligned):
    """Takes down what channels' readers see, and the class of every position."""

    def __init__(self, graph: ChannelGraph, images: int, whole: bool) -> None:
        super().__init__(graph, needed=set())  # where the forward takes another road, what was seen is still right
        self.read: list[tuple[Any, torch.Tensor]] = []  # means, or (activation, dim) where wholes are wanted
        self.readers = {read.op for read in graph._core.reads}
        self.images = images
        self.whole = whole

    def on_call(self, op: int, func, args: tuple, kwargs: dict, shift: int = 0):
        for value, dim, axis in self.labelled(op, args, shift) if op in self.readers else ():
            classes = torch.from_numpy(self.graph._core.axis_classes(axis))
            if value.is_floating_point() and classes.numel() == value.shape[dim]:
                self.read.append(((value, dim) if self.whole else _means(value, dim, self.images), classes))
        return func(*args, **kwargs)
