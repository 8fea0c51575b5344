"""Real networks at half the MACs: the budget is met, and compacted equals masked."""

import copy

import pytest
import torch
import torchvision
from reference.masked import counted_macs, kept_positions, with_zeroed_readers
from reference.randomise import random_keep, randomise, relative_error
from torch import nn

from stamp_fast import Budget, importance, trace
from stamp_fast.graph._verify import masked_output

MODELS = [
    "resnet18",
    "resnet50",
    "vgg19_bn",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "densenet121",
    "googlenet",
    "regnet_y_400mf",
    "efficientnet_b0",
]


def make(name: str) -> nn.Module:
    if name == "googlenet":
        model = torchvision.models.googlenet(num_classes=10, init_weights=False)
    elif name == "vgg19_bn":
        model = torchvision.models.vgg19_bn(num_classes=10, init_weights=False)
        # 100 million weights in the first linear layer would only cost time.
        model.avgpool = nn.AdaptiveAvgPool2d(2)
        model.classifier[0] = nn.Linear(512 * 4, 256)
        model.classifier[3] = nn.Linear(256, 128)
        model.classifier[6] = nn.Linear(128, 10)
    else:
        model = torchvision.models.get_model(name, num_classes=10)
    return randomise(model).eval()


def first_output(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return make(request.param)


def test_half_the_macs_in_float64(model):
    model.double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    graph = trace(model, x)
    dense_macs = counted_macs(model, x)
    assert graph.macs() == pytest.approx(dense_macs, rel=1e-3)
    # Ranked globally, random scores cut each group by another share.
    keep = graph.select(importance.random(graph, seed=0), Budget(macs=0.5))
    with torch.no_grad():
        dense = model(x)
        by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
        verified = masked_output(graph, keep, x)
        with graph.masked(keep):
            masked = model(x)
        assert torch.equal(model(x), dense)
        assert relative_error(by_hand, dense) > 1e-3, "the mask did not move the output"
        graph.compact(keep)
        compacted = model(x)
    assert relative_error(compacted, by_hand) < 1e-9
    assert relative_error(verified, by_hand) < 1e-9
    assert relative_error(masked, by_hand) < 1e-9
    assert 0.98 * 0.5 <= counted_macs(model, x) / dense_macs <= 1.02 * 0.5
    assert sum(p.numel() for p in model.parameters()) == graph.params(keep)


def test_random_cut_in_float32_and_training(model):
    x = torch.randn(4, 3, 64, 64)
    graph = trace(model, x)
    keep = random_keep(graph)
    kept = [g for g in graph.groups if not keep[g.classes].all()]
    assert len(kept) > 0.9 * len(graph.groups)
    with torch.no_grad():
        dense = model(x)
        by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
        with graph.masked(keep):
            masked = model(x)
        graph.compact(keep)
        compacted = model(x)
    assert relative_error(by_hand, dense) > 1e-3
    assert relative_error(masked, by_hand) < 1e-4
    assert relative_error(compacted, by_hand) < 1e-4

    model.train()
    output = model(x)
    outputs = [output] if isinstance(output, torch.Tensor) else [o for o in output if o is not None]
    sum(o.square().mean() for o in outputs).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.shape == parameter.shape, name
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
@pytest.mark.parametrize("seed", range(4))
def test_many_random_cuts(name, seed):
    model = make(name).double()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    graph = trace(model, x)
    keep = random_keep(graph, seed)
    small = copy.deepcopy(model)
    with torch.no_grad():
        by_hand = with_zeroed_readers(model, kept_positions(graph, keep))(x)
        trace(small, x).compact(keep)
        assert relative_error(small(x), by_hand) < 1e-9
