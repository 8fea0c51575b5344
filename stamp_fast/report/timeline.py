"""Which layer a training step is in, forward and backward, from its begin to its end."""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..graph._undisturbed import named_modules

OTHER = "(other)"
OPTIMIZER = "(optimizer)"


class Timeline:
    """Marks in time, each with what runs from there on; so every moment of a step belongs to exactly one layer.

    The forward is marked by hooks of the layers. Autograd numbers the nodes of its graph as it makes them: the layer
    that was running when a node was made is marked when the backward comes to it. No module has a backward hook and
    no tensor is touched, so that layers in place, reused layers and custom autograd functions run as they always do.

    Args:
        now: the time, as `seconds` takes it.
        seconds: between two such times.
    """

    def __init__(self, now: Callable[[], Any], seconds: Callable[[Any, Any], float]) -> None:
        self._now, self._seconds = now, seconds
        self._marks: list[tuple[Any, str | None]] = []
        self._running = [OTHER]  # layers in layers
        self._first_nodes: list[int] = []  # nodes from this number on ...
        self._made_in: list[str] = []  # ... were made in this layer

    def mark(self, name: str | None) -> None:
        """From here on `name` runs; None is left out of all times."""
        self._marks.append((self._now(), name))

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Marks the forwards of the model's layers."""
        handles = []
        try:
            for name, layer in layers_of(model).items():
                handles.append(layer.register_forward_pre_hook(lambda *_, n=name: self._enter(n), prepend=True))
                handles.append(layer.register_forward_hook(lambda *_: self._leave(), always_call=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def watch_backward(self, loss: torch.Tensor) -> None:
        """Marks the layers in the backward of this loss."""
        todo, seen = [loss.grad_fn], {None}
        while todo:
            node = todo.pop()
            if node in seen:
                continue
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
            # A gradient is accumulated right after the node that made it, and belongs to that node's layer.
            if node.next_functions:
                made = bisect_right(self._first_nodes, node._sequence_nr()) - 1
                name = self._made_in[made] if made >= 0 else OTHER
                node.register_prehook(lambda _, n=name: self._back_in(n))

    def totals(self) -> dict[str, float]:
        """Seconds by name, up to the last mark, in the order of their first marks; "(other)" comes last."""
        spent: dict[str, float] = {}
        for (begin, name), (end, _) in pairwise(self._marks):
            if name is not None:
                spent[name] = spent.get(name, 0.0) + self._seconds(begin, end)
        optimizer, other = spent.pop(OPTIMIZER, 0.0), spent.pop(OTHER, 0.0)
        return spent | {OPTIMIZER: optimizer, OTHER: other}

    def _enter(self, name: str) -> None:
        self._running.append(name)
        self._mark_forward()

    def _leave(self) -> None:
        self._running.pop()
        self._mark_forward()

    def _mark_forward(self) -> None:
        self.mark(self._running[-1])
        self._first_nodes.append(torch.autograd._get_sequence_nr())
        self._made_in.append(self._running[-1])

    def _back_in(self, name: str) -> None:
        self._running[0] = name  # what goes on after a layer that a checkpointed forward runs again
        self.mark(name)


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Modules without children, and those that have weights of their own besides: attention with its projections.

    What computes a weight (`torch.nn.utils.parametrize`) belongs to the layer that has the weight.
    """
    layers = {}
    for name, module in named_modules(model).items():
        if "parametrizations" in name.split("."):
            continue
        children = [child for key, child in module._modules.items() if child is not None and key != "parametrizations"]
        if not children or (name and any(p is not None for p in module._parameters.values())):
            layers[name] = module
    return layers
