import math

import pytest
import torch
from PIL import Image
from test_early_pruner import IMAGES, QUARTER, Net, loss, sgd

from stamp_fast import ArgumentError
from stamp_fast.early import EarlyPruner, Scan, scan

EPOCHS = 4


def start():
    torch.manual_seed(0)
    model = Net()
    optimizer = sgd(model)
    return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)


def train_epoch(model, optimizer, schedule, epoch, observe):
    generator = torch.Generator().manual_seed(epoch)
    for _ in range(2):
        images = IMAGES + 0.1 * torch.randn(IMAGES.shape, generator=generator)
        loss(model, images).backward()
        observe()
        optimizer.step()
        optimizer.zero_grad()
    schedule.step()


@torch.no_grad()
def fit(model):
    return math.exp(-float(loss(model)))


def by_hand(cut):
    """A training of its own for one cut, from the start."""
    parts = start()
    pruner = EarlyPruner(*parts[:2], IMAGES[:2], budget=QUARTER, cap=cut)
    for epoch in range(EPOCHS):
        train_epoch(*parts, epoch, pruner.observe)
        pruner.epoch_end()
    return fit(parts[0])


def test_a_scan_is_one_training_for_every_cut():
    options = {"budget": QUARTER, "cap": 3, "progress": False}
    found = scan(start, train_epoch, fit, IMAGES[:2], EPOCHS, **options)
    assert found.epochs == [1, 2, 3, 4]
    assert found.accuracies == [by_hand(cut) for cut in found.epochs]
    assert len(set(found.accuracies)) > 1
    assert found.chosen == 3
    assert len(found.indicators) == EPOCHS
    assert found.accuracy(found.best) == max(found.accuracies)


def test_the_epoch_in_which_it_settles():
    def still(model, optimizer, schedule, epoch, observe):
        pass

    options = {"budget": QUARTER, "importance": "magnitude", "window": 2, "progress": False, "at": [1, 4]}
    found = scan(start, still, fit, IMAGES[:2], 5, **options)
    assert found.chosen == 3
    assert found.epochs == [1, 4]


def test_json_and_plot(tmp_path):
    found = Scan([1, 2], [0.5, 0.7], [float("nan"), 0.9], 2, 0.944)
    again = Scan.from_json(found.to_json())
    assert again.epochs == found.epochs and again.accuracies == found.accuracies and again.indicators[1] == 0.9
    assert math.isnan(again.indicators[0])
    with Image.open(found.plot(tmp_path / "scan.png", "a title")) as figure:
        assert figure.width > 400


@pytest.mark.parametrize("at", [[], [0], [5]])
def test_epochs_that_there_are_not(at):
    with pytest.raises(ArgumentError, match="at"):
        scan(start, train_epoch, fit, IMAGES[:2], EPOCHS, at=at, budget=QUARTER)
