"""A first fit of the head: gates that are judged by a random head learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
    rest = [p for p in graph.model.parameters() if p.requires_grad and id(p) not in chosen]
    optimizer = torch.optim.Adam(head, lr=_LEARNING_RATE)
    plan = graph.plan(graph.all_kept())
    for parameter in rest:
        parameter.requires_grad_(False)
    try:
        for batch in batches:
            with torch.enable_grad(), graph.masked(plan):
                loss_fn(graph.model, batch).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    finally:
        for parameter in rest:
            parameter.requires_grad_(True)
