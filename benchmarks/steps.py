"""Train steps that are timed: in which precision, on which channels, and the step itself."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional as F

from stamp_fast import Budget, ChannelGraph, importance

__all__ = ["BATCH", "BFLOAT16", "FLOAT32", "Batch", "Precision", "batch_for", "choose", "loss_of", "train_step"]

BATCH = 64

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    autocast: bool
    layout: torch.memory_format


FLOAT32 = Precision("float32", False, torch.contiguous_format)
BFLOAT16 = Precision("bfloat16 autocast, channels_last", True, torch.channels_last)


def batch_for(precision: Precision) -> Batch:
    """CIFAR-shaped noise."""
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=precision.layout)
    return images, torch.randint(10, (BATCH,))


def loss_of(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def choose(method: str, graph: ChannelGraph, batch: Batch, round_to: int | None = None) -> torch.Tensor:
    """The channels that stay, at about a quarter of the MACs: half of every layer, or widths of all kinds."""
    if method == "magnitude":
        scores = importance.magnitude(graph, p=2)
        return graph.select(scores, Budget(channels=0.5), ranking="local", round_to=round_to)
    scores = importance.taylor(graph, [batch], loss_of)
    return graph.select(scores, Budget(macs=0.25), ranking="global", floor=0.1, round_to=round_to)


def train_step(
    model: nn.Module,
    batch: Batch,
    autocast: bool,
    around: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Callable[[], float]:
    """Forward, backward and SGD with momentum, when called; gives the loss."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with around():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, batch)
            loss.backward()
        optimizer.step()
        return loss.item()

    return step
