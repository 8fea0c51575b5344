"""The structural work alone, beside Torch-Pruning: from a dense model to one with half the channels."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch_pruning
import torchvision
from torch import nn

from stamp_fast import Budget, importance, trace
from stamp_fast.graph._verify import difference, masked_output

from .networks import randomise
from .timing import Contestant, Ratio, in_turns

# Rounds, and how many times faster than Torch-Pruning.
MODELS = {
    "resnet18": (5, 1),
    "resnet50": (5, 1),
    "mobilenet_v2": (5, 1),
    "vgg19_bn": (3, 10),
    "densenet121": (3, 10),
}


def stamp_fast_prune(model: nn.Module, example: torch.Tensor, settle: bool = False) -> nn.Module:
    graph = trace(model, example)
    if settle:
        graph.settle()
    keep = graph.select(importance.magnitude(graph, p=2), Budget(channels=0.5), ranking="local")
    return graph.compact(keep)


def torch_pruning_prune(model: nn.Module, example: torch.Tensor) -> nn.Module:
    head = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        ignored_layers=[head],
    )
    pruner.step()
    return model


def _params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _check(model: nn.Module) -> tuple[nn.Module, float]:
    """The pruned copy has the predicted size, computes what masking does, and trains."""
    small = copy.deepcopy(model)
    images = torch.randn(2, 3, 64, 64)
    graph = trace(small, images)
    keep = graph.select(importance.magnitude(graph, p=2), Budget(channels=0.5), ranking="local")
    expected, predicted = masked_output(graph, keep, images), graph.params(keep)
    graph.compact(keep)
    assert _params(small) == predicted < graph.params()
    with torch.no_grad():
        error = difference(small.eval()(images), expected)
    assert error < 1e-4
    _check_trains(small)
    return small, error


def _check_trains(model: nn.Module) -> None:
    output = model.train()(torch.randn(2, 3, 224, 224))
    output.square().sum().backward()
    assert output.shape == (2, 1000)
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_structural(measure: Callable[..., None], name: str) -> None:
    rounds, times_faster = MODELS[name]
    torch.manual_seed(0)
    model = randomise(torchvision.models.get_model(name, weights=None)).eval()
    example = torch.randn(1, 3, 224, 224)
    small, error = _check(model)
    theirs = torch_pruning_prune(copy.deepcopy(model), example)
    _check_trains(theirs)
    dense, left, left_by_theirs = _params(model), _params(small), _params(theirs)
    del small, theirs

    def fresh() -> nn.Module:
        gc.collect()
        return copy.deepcopy(model)

    contestants = {
        "stamp_fast": Contestant(partial(stamp_fast_prune, example=example), fresh),
        # As in prune(), which checks a probe before anything is scored.
        "stamp_fast, settled": Contestant(partial(stamp_fast_prune, example=example, settle=True), fresh),
        "Torch-Pruning": Contestant(partial(torch_pruning_prune, example=example), fresh),
    }
    measure(
        name,
        in_turns(contestants),
        rounds=rounds,
        ratios=[
            Ratio("Torch-Pruning", "stamp_fast", at_least=times_faster),
            Ratio("Torch-Pruning", "stamp_fast, settled"),
        ],
        params={"dense": dense, "stamp_fast": left, "Torch-Pruning": left_by_theirs},
        torch_pruning=torch_pruning.__version__,
        equality_error=error,
        note=f"parameters left {left / dense:.3f}, by Torch-Pruning {left_by_theirs / dense:.3f}",
    )
