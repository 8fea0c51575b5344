"""A small training with an early cut as a program: killed, resumed and spread over processes by the tests.

python train_run.py FOLDER [--die-in-the-cut=RANK] [--fail-in-the-cut=RANK] [--plain] [--uneven]
    [--static_graph] [--find_unused_parameters] [--hook]

Writes FOLDER/rank-N.pt, what each process ends with, FOLDER/checkpoint after every epoch, and FOLDER/failed-N.pt, the
network after a cut that failed.
"""

import os
import sys
from pathlib import Path

import torch
from torch import distributed, nn
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from stamp_fast import Budget, CompactionError
from stamp_fast.early import EarlyPruner, early_pruner

EPOCHS, CAP, STEPS = 5, 3, 2


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4)),
    )


def dies(*args, **options):
    os._exit(9)


def fails(*args, **options):
    raise CompactionError("on purpose")


def main() -> None:
    folder = Path(sys.argv[1])
    distributed.init_process_group("gloo")
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    switches = ("static_graph", "find_unused_parameters")
    options = {"gradient_as_bucket_view": True, **{name: f"--{name}" in sys.argv for name in switches}}
    trained = model if "--plain" in sys.argv else DistributedDataParallel(model, **options)
    if "--hook" in sys.argv:
        state = powerSGD_hook.PowerSGDState(None, start_powerSGD_iter=2, min_compression_rate=0.5)
        trained.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    pruner = EarlyPruner(trained, optimizer, torch.zeros(2, 3, 8, 8), budget=Budget(macs=0.25), cap=CAP)
    parts = {"pruner": pruner, "model": model, "optimizer": optimizer, "schedule": schedule}
    epochs = 0
    if (folder / "checkpoint").exists():
        state = torch.load(folder / "checkpoint", weights_only=True)
        epochs = state.pop("epochs")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    if f"--die-in-the-cut={rank}" in sys.argv:
        early_pruner.select_and_cut = dies
    if f"--fail-in-the-cut={rank}" in sys.argv:
        early_pruner.select_and_cut = fails
    for epoch in range(epochs, EPOCHS):
        generator = torch.Generator().manual_seed(100 * epoch + rank)  # other data in every process
        for _ in range(STEPS):
            images = torch.randn(8, 3, 8, 8, generator=generator)
            labels = torch.randint(4, (8,), generator=generator)
            value = nn.functional.cross_entropy(trained(images), labels)
            value.backward()
            if "--plain" in sys.argv:  # gradients averaged by hand
                for parameter in model.parameters():
                    distributed.all_reduce(parameter.grad)
                    parameter.grad /= ranks
            pruner.observe()
            optimizer.step()
            optimizer.zero_grad()
        if "--uneven" in sys.argv and rank:  # one that has seen more
            value = nn.functional.cross_entropy(model(images), labels)
            value.backward()
            pruner.observe()
            optimizer.zero_grad()
        try:
            pruner.epoch_end()
        except CompactionError:
            torch.save(model.state_dict(), folder / f"failed-{rank}.pt")
            raise
        schedule.step()
        if rank == 0:
            state = {name: part.state_dict() for name, part in parts.items()} | {"epochs": epoch + 1}
            torch.save(state, folder / "writing")
            os.replace(folder / "writing", folder / "checkpoint")
    state = {"model": model.state_dict(), "history": pruner.history, "cut": pruner.cut_epoch}
    torch.save(state | {"optimizer": optimizer.state_dict()}, folder / f"rank-{rank}.pt")
    distributed.barrier()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
