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
    assert model[0].num_batches_tracked == 0  # put back: it counts the user's own batches


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
        frozen = model.bn1.running_mean.clone()
        assert recalibrate(model, batches(), forward) == 3  # bn1 was put in eval mode by its owner
        assert torch.equal(model.bn1.running_mean, frozen)
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


def test_layers_out_of_reach_keep_their_statistics():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.train_only, self.never = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.bn(x)
            return (y, self.train_only(y)) if self.training else y

    model = TwoHeads()
    for norm in (model.train_only, model.never):
        norm.running_mean.fill_(5.0)
        norm.num_batches_tracked.fill_(7)
    recalibrate(model, [torch.randn(4, 3, 2, 2)], forward)
    assert model.bn.running_mean.abs().sum() > 0
    for norm in (model.train_only, model.never):
        assert torch.equal(norm.running_mean, torch.full((3,), 5.0)) and norm.num_batches_tracked == 7
