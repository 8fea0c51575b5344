"""Training from scratch that grows cheaper on the way: the network is cut once its architecture has come to rest.

    python examples/early_pruning.py
    python examples/early_pruning.py --epochs 30 --cap 10

Two calls are added to an ordinary loop: `observe` in every step, `epoch_end` after every epoch.
"""

from __future__ import annotations

import click
import torch
from digits import Net, accuracy, loaders, parameters
from torch.nn import functional as F

from stamp_fast import Budget
from stamp_fast.early import EarlyPruner


@click.command()
@click.option("--macs", default=0.25, show_default=True, help="Multiply-accumulates that may stay, as a fraction.")
@click.option("--epochs", default=4, show_default=True, help="Of the whole training.")
@click.option("--cap", default=2, show_default=True, help="Epoch after which it is cut, settled or not.")
@click.option("--seed", default=0, show_default=True)
def main(macs: float, epochs: int, cap: int, seed: int) -> None:
    """Trains on the digits and cuts on the way."""
    torch.manual_seed(seed)
    train, test = loaders()
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    example = next(iter(train))[0][:2]
    pruner = EarlyPruner(model, optimizer, example, budget=Budget(macs=macs), cap=cap)
    before = parameters(model)
    for epoch in range(epochs):
        for images, labels in train:
            F.cross_entropy(model(images), labels).backward()
            pruner.observe()  # the gradients are there, and the optimizer has not stepped yet
            optimizer.step()
            optimizer.zero_grad()
        if pruner.epoch_end():  # optimizer and schedule go on as they are
            print(f"cut after epoch {pruner.cut_epoch}; parameters: {before} -> {parameters(model)}")
        schedule.step()
        print(f"epoch {epoch + 1}: accuracy {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
