"""The generator that the demo ships: fits its network, serves many budgets, and beats Taylor without a step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn")

from stamp_fast import ArgumentError, Budget, prune, trace
from stamp_fast.demo import digits
from stamp_fast.demo.network import GENERATOR, GlyphResNet, pretrained_for
from stamp_fast.stamp import MaskGenerator

ASK = Budget(macs=0.125)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def data() -> tuple[list, tuple[torch.Tensor, torch.Tensor]]:
    """Twelve batches of cluttered digits, and 400 test images."""
    train, test = digits.datasets()
    batches = list(digits.train_loader(train, 64, seed=0))[:12]
    return batches, tuple(part[:400] for part in test.tensors)


def accuracy_after(model: nn.Module, batches: list, test: tuple[torch.Tensor, torch.Tensor]) -> float:
    """A short fine-tuning on the batches."""
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9, nesterov=True)
    for images, labels in batches:
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        return (model(test[0]).argmax(1) == test[1]).float().mean().item()


def test_it_was_meta_trained_and_fits():
    graph = trace(pretrained_for(10, 0), torch.zeros(2, 1, 32, 32))
    graph.settle()
    generator = MaskGenerator.load(GENERATOR)
    generator.check_fits(graph)
    assert int(generator.tasks) >= 100
    untrained = MaskGenerator.untrained(graph)
    assert (generator.beta - untrained.beta).abs().max() > 0.01
    with pytest.raises(ArgumentError, match="generator: is for GlyphResNet, not for this GlyphResNet: it has"):
        prune(
            GlyphResNet(10, widths=(16, 48, 96)),
            [(torch.rand(8, 1, 32, 32), torch.arange(8))],
            generator=GENERATOR,
            progress=False,
        )


@pytest.mark.parametrize("macs", [0.125, 0.5])
def test_one_generator_serves_many_budgets(macs, data):
    model = pretrained_for(10, 0)
    before = trace(model, torch.zeros(2, 1, 32, 32)).macs()
    prune(model, data[0][:4], budget=Budget(macs=macs), generator=GENERATOR, steps=0, seed=0, progress=False)
    assert trace(model, torch.zeros(2, 1, 32, 32)).macs() / before == pytest.approx(macs, rel=0.02)


def test_no_step_at_all_beats_taylor_with_one_batch(data):
    batches, test = data
    ours, taylor = [], []
    for seed in range(2):
        model = prune(pretrained_for(10, seed), batches, budget=ASK, generator=GENERATOR, steps=0, progress=False)
        other = prune(pretrained_for(10, seed), batches[:1], budget=ASK, method="taylor", progress=False)
        ours.append([accuracy_after(model, batches[:steps], test) for steps in (0, 12)])
        taylor.append([accuracy_after(other, batches[:steps], test) for steps in (0, 12)])
    means = [torch.tensor(found).mean(0) for found in (ours, taylor)]
    assert (means[0] > means[1] + 0.03).all(), f"without a step {means[0]}, Taylor with one batch {means[1]}"
