"""A first fit of the head: gates that are judged by a random head learn nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from ..data import LossFn
from ..graph import ChannelGraph

_LEARNING_RATE = 0.03
_LARGEST_GRADIENT = 5.0


def fit_head(graph: ChannelGraph, batches: Iterable[Any], loss_fn: LossFn) -> None:
    """Trains the parameters that emit the model's output, one Adam step a batch; the rest of the network is fixed.

    A step costs one forward: nothing is kept for the backward of the fixed part.
    """
    head = [p for p in graph.output_parameters() if p.requires_grad]
    if not head:
        return
    chosen = {id(p) for p in head}
    step = stepping(torch.optim.Adam, head, lr=_LEARNING_RATE)
    plan = graph.plan(graph.all_kept())
    with torch.enable_grad(), fixed(p for p in graph.model.parameters() if id(p) not in chosen):
        for batch in batches:
            with graph.masked(plan):
                loss_fn(graph.model, batch).backward()
            step()


def stepping(optimizer: type[torch.optim.Optimizer], parameters: list[nn.Parameter], **options: Any) -> Callable:
    """A step of an optimizer that any loss and dtype can stand; it leaves no gradient behind.

    It works in float32 where the parameters are of less: Adam in float16 divides by zero. Gradients are clipped: a
    loss may be of any scale. A gradient that is not finite is passed over.
    """
    low = (torch.float16, torch.bfloat16)
    masters = [p.detach().float().clone() if p.dtype in low else p for p in parameters]
    chosen = optimizer(masters, **options)

    def step() -> None:
        for master, parameter in zip(masters, parameters, strict=True):
            if master is not parameter:
                master.grad = None if parameter.grad is None else parameter.grad.float()
        if bool(torch.nn.utils.clip_grad_norm_(masters, _LARGEST_GRADIENT).isfinite()):
            chosen.step()
            with torch.no_grad():
                for master, parameter in zip(masters, parameters, strict=True):
                    if master is not parameter:
                        parameter.copy_(master)
        for tensor in (*masters, *parameters):
            tensor.grad = None

    return step


def fixed(parameters: Iterable[nn.Parameter]) -> AbstractContextManager[None]:
    """These want no gradient, so none is computed for them."""
    return wanting_gradients(parameters, False)


@contextmanager
def wanting_gradients(parameters: Iterable[nn.Parameter], wanted: bool) -> Iterator[None]:
    """All of these want a gradient, or none of them."""
    changed = [p for p in parameters if p.requires_grad != wanted and (p.is_floating_point() or p.is_complex())]
    try:
        for parameter in changed:
            parameter.requires_grad_(wanted)
        yield
    finally:
        for parameter in changed:
            parameter.requires_grad_(not wanted)
