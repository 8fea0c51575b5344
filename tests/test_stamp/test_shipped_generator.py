"""The generator that the demo ships: fits its network, serves many budgets, and beats Taylor without a step."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

pytest.importorskip("sklearn")

from stamp_fast import ArgumentError, Budget, importance, prune, trace
from stamp_fast.data import cross_entropy
from stamp_fast.demo import digits
from stamp_fast.demo.network import GENERATOR, GlyphResNet, pretrained_for
from stamp_fast.recalibrate import recalibrate
from stamp_fast.reconstruct import reconstruct
from stamp_fast.stamp import MaskGenerator
from stamp_fast.stamp.adapt import HEAD_STEPS
from stamp_fast.stamp.head import fit_head

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
    recalibrate(model, batches, cross_entropy)
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
    """The same head, fitted to the same images, and the same folding for both: only the choice of channels differs."""
    batches, test = data
    found = {"generator": [], "taylor": []}
    for seed in range(3):
        start = pretrained_for(10, seed).train()
        fit_head(trace(start, batches[0][0][:2]), (batches * 2)[:HEAD_STEPS], cross_entropy)
        for name, accuracies in found.items():
            model = copy.deepcopy(start)
            graph = trace(model, batches[0][0][:2])
            graph.settle()
            inputs, labels = zip(*batches[:4], strict=True)
            if name == "generator":
                gates = MaskGenerator.load(GENERATOR).gates(graph, list(inputs), torch.cat(labels), ASK)
                scores = gates.probability().detach()
            else:
                scores = importance.taylor(graph, batches[:1], cross_entropy)
            keep = graph.select(scores, ASK, ranking="global", floor=0.1)
            reconstruct(graph, keep, list(inputs))
            graph.compact(keep)
            accuracies.append(accuracy_after(model, batches, test))
    ours, taylor = (sum(accuracies) / 3 for accuracies in found.values())
    assert ours > taylor + 0.02, f"without a step {found['generator']}, Taylor with one batch {found['taylor']}"
