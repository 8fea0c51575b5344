"""Early pruning under FSDP2, held to the same training under DDP (`train_sharded.py`)."""

import re
import sys

import pytest
import torch
import train_sharded
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stamp_fast import ArgumentError, ModelError
from stamp_fast.early import EarlyPruner
from stamp_fast.early.sharded import ShardedEarlyPruner
from tests.processes import launch


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, ("sgd", "taylor", "1", "2")),
        (2, ("adamw", "taylor", "3", "4")),
        (2, ("adamw", "magnitude", "3", "3")),
        (4, ("sgd", "magnitude", "1", "4")),
    ],
)
def test_a_sharded_training_ends_as_one_under_ddp_and_resumes(ranks, options):
    launch([sys.executable, train_sharded.__file__, *options], ranks)


@pytest.fixture
def alone(tmp_path):
    """A process group of this process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def pruner_of(model: nn.Module, **changes) -> ShardedEarlyPruner:
    optimizer = changes.pop("optimizer", None) or torch.optim.SGD(model.parameters(), 0.1)
    options = {"make": train_sharded.network, "shard": train_sharded.shard, "cap": 1, **changes}
    return ShardedEarlyPruner(model, optimizer, train_sharded.EXAMPLE, **options)


def test_what_cannot_be_is_refused(alone):
    model = train_sharded.shard(train_sharded.network())
    partly = train_sharded.network()
    fully_shard(partly[3], mesh=init_device_mesh("cpu", (1,)))
    for other in (train_sharded.network(), partly):
        with pytest.raises(ModelError, match="not sharded, or not all of it"):
            pruner_of(other)
    with pytest.raises(ArgumentError, match=re.escape("its '0.weight' is ((16, 3, 3, 3), torch.float32)")):
        pruner_of(model, make=lambda: train_sharded.network().float())
    with pytest.raises(ArgumentError, match="make: gives another network"):
        pruner_of(model, make=lambda: nn.Sequential(nn.Conv2d(3, 16, 3)))
    with pytest.raises(ArgumentError, match="make: has to give a network that is not sharded"):
        pruner_of(model, make=lambda: train_sharded.shard(train_sharded.network()))
    with pytest.raises(ArgumentError, match="optimizer: holds parameters that are not the model's"):
        pruner_of(model, optimizer=torch.optim.SGD(train_sharded.network().parameters(), 0.1))
    with pytest.raises(ArgumentError, match="ema"):
        pruner_of(model, ema=train_sharded.network())
    with pytest.raises(ModelError, match="early.sharded"):
        EarlyPruner(model, None, train_sharded.EXAMPLE, cap=1)


def test_a_shard_that_fails_leaves_model_and_optimizer(alone):
    model = train_sharded.shard(train_sharded.network())
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = pruner_of(model, optimizer=optimizer, shard=lambda m: m)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    model(images).square().sum().backward()
    pruner.observe()
    optimizer.step()
    before = [p.full_tensor().clone() for p in model.parameters()]
    with pytest.raises(ModelError, match="shard: returned a model that is not sharded"):
        pruner.epoch_end()
    assert pruner.model is model
    for mine, parameter, held in zip(before, model.parameters(), optimizer.param_groups[0]["params"], strict=True):
        assert parameter is held and torch.equal(parameter.full_tensor(), mine)
    assert len(optimizer.state) == sum(p.grad is not None for p in model.parameters())
    pruner._shard = train_sharded.shard
    assert pruner.epoch_end()  # it is tried again
    assert pruner.model is not model and pruner.model[0].weight.shape[0] < 16
    pruner.model(images).square().sum().backward()
    optimizer.step()
    assert not pruner.epoch_end()
