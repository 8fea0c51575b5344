"""A first fit of the head: gates that are judged by a random head learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..graph import ChannelGraph

_LEARNING_RATE = 0.03


def fit_head(graph: ChannelGraph, batches: Iterable[Any], loss_fn: Callable[[nn.Module, Any], torch.Tensor]) -> None:
    """Trains the parameters that emit the model's output, one Adam step a batch; the rest of the network is fixed.

    A step costs one forward: nothing is kept for the backward of the fixed part.
    """
    head = [p for p in graph.output_parameters() if p.requires_grad]
    if not head:
        return
    chosen = {id(p) for p in head}
    optimizer = torch.optim.Adam(head, lr=_LEARNING_RATE)
    plan = graph.plan(graph.all_kept())
    with torch.enable_grad(), fixed(p for p in graph.model.parameters() if id(p) not in chosen):
        for batch in batches:
            with graph.masked(plan):
                loss_fn(graph.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


@contextmanager
def fixed(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """These want no gradient, so none is computed for them."""
    wanted = [p for p in parameters if p.requires_grad]
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
