"""Fresh batch norm statistics are the average over the batches, and nothing else changes."""

import pytest
import torch
from reference.networks import Residual
from reference.randomise import randomise
from torch import nn

from stamp_fast.recalibrate import recalibrate


def forward(model, batch):
    return model(batch)


def test_statistics_are_averages_over_batches():
    model = nn.Sequential(nn.BatchNorm2d(3)).eval()
    batches = [torch.randn(8, 3, 4, 4) * (i + 1) + i for i in range(4)]
    assert recalibrate(model, batches, forward) == 1
    mean = torch.stack([b.mean((0, 2, 3)) for b in batches]).mean(0)
    variance = torch.stack([b.var((0, 2, 3)) for b in batches]).mean(0)
    assert torch.allclose(model[0].running_mean, mean, atol=1e-5)
    assert torch.allclose(model[0].running_var, variance, rtol=1e-4)
    assert model[0].num_batches_tracked == 4


@pytest.mark.parametrize("fails", [False, True])
def test_flags_momenta_and_weights_are_put_back(fails):
    model = randomise(Residual()).train()
    model.bn1.eval()
    model.bn2.momentum = 0.01
    model.bn3.momentum = None
    flags = {name: module.training for name, module in model.named_modules()}
    weights = {name: p.clone() for name, p in model.named_parameters()}

    def batches():
        yield torch.randn(4, 1, 8, 8)
        if fails:
            raise OSError("gone")

    if fails:
        with pytest.raises(OSError, match="gone"):
            recalibrate(model, batches(), forward)
    else:
        assert recalibrate(model, batches(), forward) == 4
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert (model.bn1.momentum, model.bn2.momentum, model.bn3.momentum) == (0.1, 0.01, None)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())


def test_dropout_stays_off_and_no_gradient_is_made():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(4)).train()
    batch = torch.randn(64, 4) + 3
    recalibrate(model, [batch], forward)
    assert torch.allclose(model[1].running_mean, batch.mean(0), atol=1e-5)
    assert model[1].weight.grad is None and not model[1].running_mean.requires_grad


def test_nothing_to_recalibrate():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    assert recalibrate(model, iter(()), forward) == 0
