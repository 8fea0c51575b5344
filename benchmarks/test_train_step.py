"""One train step (forward, backward, SGD with momentum): dense, virtually compacted, compacted, and written
by hand at the same widths.
"""

from __future__ import annotations

import contextlib
import copy
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
BUDGET = Budget(macs=0.25)
RATIOS = [
    Ratio("dense", "compacted", at_least=3.0),
    Ratio("compacted", "by hand", at_most=1.03),
    Ratio("virtual", "by hand", at_most=1.3),
    # The same network twice: how far from 1 the machine's noise alone goes.
    Ratio("by hand, again", "by hand"),
]

Batch = tuple[torch.Tensor, torch.Tensor]


def _loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def _choose(method: str, graph: ChannelGraph, batch: Batch) -> torch.Tensor:
    if method == "magnitude":  # much the same share of every layer
        return graph.select(importance.magnitude(graph, p=2), BUDGET, ranking="local")
    scores = importance.taylor(graph, [batch], _loss)  # widths of all kinds
    return graph.select(scores, BUDGET, ranking="global", floor=0.1)


def _step(model: nn.Module, batch: Batch, around: Callable[[], AbstractContextManager]) -> Callable[[], float]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with around():
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


@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_train_step(measure: Callable[..., None], method: str) -> None:
    torch.manual_seed(0)
    batch = torch.randn(BATCH, 3, 32, 32), torch.randint(10, (BATCH,))
    dense = randomise(cifar_resnet18())
    virtual, compacted = copy.deepcopy(dense), copy.deepcopy(dense)
    graph = trace(virtual, batch[0])
    keep = _choose(method, graph, batch)
    trace(compacted, batch[0]).compact(keep)
    widths = widths_of(compacted)
    by_hand, again = cifar_resnet18(**widths), cifar_resnet18(**widths)
    for model in (by_hand, again):
        model.load_state_dict(compacted.state_dict())
    error = _check_outputs(virtual, graph, keep, [compacted, by_hand, again])

    plan = graph.plan(keep)
    plain = contextlib.nullcontext
    steps = {
        "dense": _step(dense, batch, plain),
        "virtual": _step(virtual, batch, lambda: graph.masked(plan)),
        "compacted": _step(compacted, batch, plain),
        "by hand": _step(by_hand, batch, plain),
        "by hand, again": _step(again, batch, plain),
    }
    # Two steps each: the second loss depends on the gradients of the first.
    losses = {name: [step(), step()] for name, step in steps.items()}
    for name in ("virtual", "compacted", "by hand, again"):
        assert losses[name] == pytest.approx(losses["by hand"], rel=1e-3), f"{name}: {losses}"

    macs = graph.macs(keep) / graph.macs()
    measure(
        f"CIFAR ResNet-18, {method}",
        in_turns({name: Contestant(step) for name, step in steps.items()}),
        rounds=20,
        ratios=RATIOS,
        widths=widths,
        macs=macs,
        equality_error=error,
        batch=BATCH,
        note=f"batch {BATCH}, {macs:.3f} of the MACs, widths {widths['widths']}, in blocks {widths['inner']}",
    )
