"""One train step (forward, backward, SGD with momentum): dense, virtually compacted, compacted, and written
by hand at the same widths. The virtual network pays for packing its weights and for an optimizer that goes over all
parameters of the dense one; both count.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stamp_fast import Budget, ChannelGraph, importance, trace
from stamp_fast.graph._verify import difference, masked_output

from .networks import cifar_resnet18, randomise, widths_of
from .timing import Contestant, Ratio, in_turns

BATCH = 64
TOLERANCE = 1e-5

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Precision:
    name: str
    autocast: bool
    layout: torch.memory_format
    virtual_at_most: float  # times the step of the network built by hand

    def ratios(self) -> list[Ratio]:
        return [
            Ratio("dense", "virtual", at_least=3.0),
            Ratio("dense", "compacted", at_least=3.0),
            Ratio("virtual", "by hand", at_most=self.virtual_at_most),
            Ratio("compacted", "by hand", at_most=1.03),
            # The same network twice: how far from 1 the machine's noise alone goes.
            Ratio("by hand, again", "by hand"),
        ]


FLOAT32 = Precision("float32", False, torch.contiguous_format, 1.1)
BFLOAT16 = Precision("bfloat16 autocast, channels_last", True, torch.channels_last, 1.2)


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _choose(method: str, graph: ChannelGraph, batch: Batch) -> torch.Tensor:
    if method == "magnitude":  # half of every layer, which is a quarter of the MACs
        return graph.select(importance.magnitude(graph, p=2), Budget(channels=0.5), ranking="local")
    scores = importance.taylor(graph, [batch], _loss)  # widths of all kinds
    return graph.select(scores, Budget(macs=0.25), ranking="global", floor=0.1)


def _step(
    model: nn.Module, batch: Batch, autocast: bool, around: Callable[[], AbstractContextManager]
) -> Callable[[], float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with around():
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = _loss(model, batch)
            loss.backward()
        optimizer.step()
        return loss.item()

    return step


@torch.no_grad()
def _check_outputs(dense: nn.Module, graph: ChannelGraph, keep: torch.Tensor, small: list[nn.Module]) -> float:
    """In eval mode all compute what the dense network with masked channels does. The largest difference."""
    images = torch.randn(4, 3, 32, 32)
    expected = masked_output(graph, keep, images)
    dense.eval()
    assert difference(dense(images), expected) > 0.01, "the channels taken out do not matter"
    with graph.masked(keep):
        outputs = [dense(images)]
    outputs += [model.eval()(images) for model in small]
    worst = max(difference(output, expected) for output in outputs)
    assert worst < TOLERANCE
    return worst


@pytest.mark.parametrize(
    "method, precision",
    [("magnitude", FLOAT32), ("magnitude", BFLOAT16), ("taylor", FLOAT32)],
    ids=["magnitude", "magnitude-bfloat16", "taylor"],
)
def test_train_step(measure: Callable[..., None], method: str, precision: Precision) -> None:
    torch.manual_seed(0)
    images = torch.randn(BATCH, 3, 32, 32).to(memory_format=precision.layout)
    batch = images, torch.randint(10, (BATCH,))
    dense = randomise(cifar_resnet18()).to(memory_format=precision.layout)
    virtual, compacted = copy.deepcopy(dense), copy.deepcopy(dense)
    graph = trace(virtual, batch[0])
    keep = _choose(method, graph, batch)
    trace(compacted, batch[0]).compact(keep)
    widths = widths_of(compacted)
    by_hand, again = (cifar_resnet18(**widths).to(memory_format=precision.layout) for _ in range(2))
    for model in (by_hand, again):
        model.load_state_dict(compacted.state_dict())
    error = _check_outputs(virtual, graph, keep, [compacted, by_hand, again])

    plan = graph.plan(keep)
    plain = contextlib.nullcontext
    contestants = {
        "dense": (dense, plain),
        "virtual": (virtual, lambda: graph.masked(plan)),
        "compacted": (compacted, plain),
        "by hand": (by_hand, plain),
        "by hand, again": (again, plain),
    }
    steps = {name: _step(model, batch, precision.autocast, around) for name, (model, around) in contestants.items()}
    # Two steps each: the second loss depends on the gradients of the first.
    losses = {name: [step(), step()] for name, step in steps.items()}
    for name in ("virtual", "compacted", "by hand, again"):
        assert losses[name] == pytest.approx(losses["by hand"], rel=1e-3), f"{name}: {losses}"

    macs = graph.macs(keep) / graph.macs()
    measure(
        f"CIFAR ResNet-18, {method}, {precision.name}",
        in_turns({name: Contestant(step) for name, step in steps.items()}),
        rounds=20,
        ratios=precision.ratios(),
        widths=widths,
        macs=macs,
        equality_error=error,
        batch=BATCH,
        note=f"batch {BATCH}, {macs:.3f} of the MACs, widths {widths['widths']}, in blocks {widths['inner']}",
    )
