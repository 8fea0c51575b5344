"""A training under FSDP2 beside the same one under DDP, as a program that every process runs.

python train_sharded.py OPTIMIZER IMPORTANCE STEPS SAVED_EPOCH

Both have to end with the same network; and so has a third that goes on from what the sharded one was after SAVED_EPOCH
epochs.
"""

import copy
import sys
from collections.abc import Callable

import torch
from torch import distributed, nn
from torch.distributed.checkpoint import state_dict as checkpoints
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from stamp_fast import Budget
from stamp_fast.early import EarlyPruner
from stamp_fast.early.sharded import ShardedEarlyPruner

EPOCHS, CAP = 6, 3
EXAMPLE = torch.zeros(2, 3, 8, 8, dtype=torch.float64)
WHOLE = checkpoints.StateDictOptions(full_state_dict=True, broadcast_from_rank0=False)
MAKERS: dict[str, Callable] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 5)),
    )
    made[8].bias.requires_grad_(False)
    return made.double()


def shard(model: nn.Module) -> nn.Module:
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    fully_shard(model[3], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def grouped(model: nn.Module) -> list[dict]:
    """The norms without weight decay, as is usual."""
    norms = [p for m in model for p in m.parameters() if isinstance(m, nn.BatchNorm2d)]
    rest = [p for m in model for p in m.parameters() if not isinstance(m, nn.BatchNorm2d) and p.requires_grad]
    return [{"params": rest, "weight_decay": 1e-2}, {"params": norms, "weight_decay": 0.0}]


def train(model: nn.Module, optimizer, schedule, pruner, epochs: range, after: Callable[[int], None]) -> nn.Module:
    for epoch in epochs:
        generator = torch.Generator().manual_seed(100 * epoch + distributed.get_rank())
        for _ in range(3):
            images = torch.randn(8, 3, 8, 8, generator=generator).double()
            labels = torch.randint(5, (8,), generator=generator)
            nn.functional.cross_entropy(model(images), labels).backward()
            if pruner.observe() and isinstance(pruner, ShardedEarlyPruner):
                model = pruner.model
            optimizer.step()
            optimizer.zero_grad()
        if pruner.epoch_end() and isinstance(pruner, ShardedEarlyPruner):
            model = pruner.model
        schedule.step()
        after(epoch + 1)
    return model


def compare(found: nn.Module, found_optimizer, expected: dict, expected_state: dict) -> None:
    mine = checkpoints.get_model_state_dict(found, options=WHOLE)
    state = checkpoints.get_optimizer_state_dict(found, found_optimizer, options=WHOLE)
    tolerance = {"rtol": 1e-9, "atol": 1e-9}
    for name, tensor in expected.items():
        if "running" not in name:  # DDP hands the first process's on
            torch.testing.assert_close(mine[name], tensor, **tolerance)
    torch.testing.assert_close(state["state"], expected_state["state"], **tolerance)
    assert [g["lr"] for g in state["param_groups"]] == [g["lr"] for g in expected_state["param_groups"]]


def main() -> None:
    kind, importance, steps, saved_epoch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    distributed.init_process_group("gloo")
    how = {"budget": Budget(macs=0.25), "cap": CAP, "steps": steps, "every": 2, "importance": importance}

    plain = network()
    optimizer = MAKERS[kind](grouped(plain))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    wrapped = DistributedDataParallel(plain)
    whole = EarlyPruner(wrapped, optimizer, EXAMPLE, **how)
    train(wrapped, optimizer, schedule, whole, range(EPOCHS), lambda _: None)
    expected = checkpoints.get_model_state_dict(plain, options=WHOLE)
    expected_state = checkpoints.get_optimizer_state_dict(plain, optimizer, options=WHOLE)

    def sharded(state: dict | None = None) -> tuple:
        model = shard(network())
        optimizer = MAKERS[kind](grouped(model))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
        pruner = ShardedEarlyPruner(model, optimizer, EXAMPLE, make=network, shard=shard, state=state, **how)
        return pruner.model, optimizer, schedule, pruner

    model, optimizer, schedule, pruner = sharded()
    saved = {}

    def after(epoch: int) -> None:
        if epoch == saved_epoch:
            model, states = checkpoints.get_state_dict(pruner.model, optimizer, options=WHOLE)
            parts = {"model": model, "optimizer": states, "schedule": schedule.state_dict()}
            saved.update(copy.deepcopy(parts), pruner=pruner.state_dict())

    dense = model
    model = train(model, optimizer, schedule, pruner, range(EPOCHS), after)
    assert model is not dense and pruner.done and whole.done
    assert pruner.pruner.history == whole.history and pruner.pruner.cut_epoch == whole.cut_epoch == CAP
    assert expected["0.weight"].shape[0] < 16
    compare(model, optimizer, expected, expected_state)

    model, optimizer, schedule, pruner = sharded(saved["pruner"])
    parts = {"model_state_dict": saved["model"], "optim_state_dict": saved["optimizer"]}
    checkpoints.set_state_dict(model, optimizer, **parts, options=WHOLE)
    schedule.load_state_dict(saved["schedule"])
    model = train(model, optimizer, schedule, pruner, range(saved_epoch, EPOCHS), lambda _: None)
    compare(model, optimizer, expected, expected_state)
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
