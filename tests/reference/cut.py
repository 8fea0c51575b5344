"""A cut at random, held to the masked dense network in every way in which the library can run it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stamp_fast import ChannelGraph, trace
from stamp_fast.graph._verify import masked_output

from .randomise import random_keep, randomise, relative_error


class Custom(nn.Module):
    """`forward(net, *inputs)` over the given modules, parameters and buffers; any other part is an attribute."""

    def __init__(self, forward: Callable, **parts: Any) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Any:
        return self.run(self, *inputs)


def settled(model: nn.Module, *inputs: Tensor) -> ChannelGraph:
    """The settled graph of the model, made random and float64."""
    graph = trace(randomise(model).double().eval(), inputs)
    graph.settle()
    return graph


def assert_exact(graph: ChannelGraph, *inputs: Tensor, seed: int = 0) -> Tensor:
    """Cuts at random: virtually and for good, the output is that of the masked dense network, and has moved."""
    model, keep = graph.model, random_keep(graph, seed)
    assert not keep.all()
    left, whole = graph.params(keep), graph.params()
    with torch.no_grad():
        dense = model(*inputs)
        expected = masked_output(graph, keep, inputs)
        with graph.masked(keep):
            assert relative_error(model(*inputs), expected) < 1e-9
        assert torch.equal(model(*inputs), dense), "a mask has left a mark"
        graph.compact(keep)
        assert relative_error(model(*inputs), expected) < 1e-9
    assert relative_error(expected, dense) > 1e-4, "the cut did not move the output"
    assert sum(p.numel() for p in model.parameters()) == left < whole
    return keep


def prunable(graph: ChannelGraph) -> set[str]:
    """Layers of which some channels can be removed."""
    return {group.name.partition("#")[0] for group in graph.prunable}


def cut_layers(graph: ChannelGraph) -> set[str]:
    """Layers that emit channels which can be removed, by whatever name their group goes."""
    pairs = zip(graph.groups, graph.layers(), strict=True)
    return {name for group, names in pairs if group.reason is None for name in names}


def reasons(graph: ChannelGraph) -> dict[str, str]:
    """Why layers, or some of their channels, are kept."""
    groups = (*graph.groups, *graph.frozen, *graph.unlisted())
    return {group.name.partition("#")[0]: group.reason for group in groups if group.reason}
