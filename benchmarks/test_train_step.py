"""One train step (forward, backward, SGD with momentum): dense, virtually compacted, compacted, and written
by hand at the same widths. The virtual network pays for packing its weights and for an optimizer that goes over all
parameters of the dense one; both count.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from stamp_fast import ChannelGraph, trace
from stamp_fast.graph._verify import difference, masked_output

from .networks import cifar_resnet18, randomise, widths_of
from .steps import BATCH, BFLOAT16, FLOAT32, Precision, batch_for, choose, train_step
from .timing import Contestant, Ratio, in_turns

TOLERANCE = 1e-5
VIRTUAL_AT_MOST = {FLOAT32: 1.1, BFLOAT16: 1.2}  # times the step of the network built by hand


def _ratios(precision: Precision) -> list[Ratio]:
    return [
        Ratio("dense", "virtual", at_least=3.0),
        Ratio("dense", "compacted", at_least=3.0),
        Ratio("virtual", "by hand", at_most=VIRTUAL_AT_MOST[precision]),
        Ratio("compacted", "by hand", at_most=1.03),
        # The same network twice: how far from 1 the machine's noise alone goes.
        Ratio("by hand, again", "by hand"),
    ]


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
    batch = batch_for(precision)
    dense = randomise(cifar_resnet18()).to(memory_format=precision.layout)
    virtual, compacted = copy.deepcopy(dense), copy.deepcopy(dense)
    graph = trace(virtual, batch[0])
    keep = choose(method, graph, batch)
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
    steps = {
        name: train_step(model, batch, precision.autocast, around) for name, (model, around) in contestants.items()
    }
    # Two steps each: the second loss depends on the gradients of the first.
    losses = {name: [step(), step()] for name, step in steps.items()}
    for name in ("virtual", "compacted", "by hand, again"):
        assert losses[name] == pytest.approx(losses["by hand"], rel=1e-3), f"{name}: {losses}"

    macs = graph.macs(keep) / graph.macs()
    measure(
        f"CIFAR ResNet-18, {method}, {precision.name}",
        in_turns({name: Contestant(step) for name, step in steps.items()}),
        rounds=20,
        ratios=_ratios(precision),
        widths=widths,
        macs=macs,
        equality_error=error,
        batch=BATCH,
        note=f"batch {BATCH}, {macs:.3f} of the MACs, widths {widths['widths']}, in blocks {widths['inner']}",
    )
