"""A small meta-training as a program: killed, resumed and spread over processes by the tests.

python meta_train_run.py GENERATOR [CHECKPOINT] [--slow]
"""

import sys
import time

import torch
from torch import distributed, nn
from torch.utils.data import TensorDataset

from stamp_fast.stamp import meta_train

SCHEDULE = {
    "tasks": 24,
    "tasks_per_update": 4,
    "inner_steps": 2,
    "head_steps": 2,
    "batch_size": 16,
    "classes": (3, 4),
    "shots": 6,
    "queries": 4,
    "budgets": (0.4, 0.6),
    "lr": 0.01,
}


def reference() -> tuple[nn.Module, TensorDataset]:
    """A network and a data set of six classes that differ in their mean image."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(6).repeat_interleave(12)
    images = torch.randn(6, 1, 8, 8, generator=generator)[labels]
    images += 0.5 * torch.randn(images.shape, generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout2d(0.1)),
        *(nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(48, 6)),
    )
    return model.eval(), TensorDataset(images, labels)


class Slow(TensorDataset):
    def __getitem__(self, i):
        time.sleep(2e-3)
        return super().__getitem__(i)


def main() -> None:
    torch.set_num_threads(1)
    files = [a for a in sys.argv[1:] if a != "--slow"]
    model, dataset = reference()
    if "--slow" in sys.argv:
        dataset = Slow(*dataset.tensors)
    checkpoint = files[1] if len(files) > 1 else None
    if distributed.is_torchelastic_launched():
        distributed.init_process_group("gloo")
    generator = meta_train(model, dataset, checkpoint=checkpoint, checkpoint_every=1, progress=False, **SCHEDULE)
    rank = distributed.get_rank() if distributed.is_initialized() else 0
    generator.save(f"{files[0]}.{rank}")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
