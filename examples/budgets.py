"""Several budgets from one pass of statistics: what does each of them cost in accuracy, and what does it save?

    python examples/budgets.py
    python examples/budgets.py --macs 0.8 --macs 0.1 --train-step 0.5 --pick 3 --out sweep

The network is traced once and scored once. Every budget is then a choice among the same scores: it is looked at in the
dense network, virtually compacted, and only the one that is picked is cut and trained.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from digits import Net, accuracy, loaders, parameters, train

import stamp_fast
from stamp_fast import Budget


@click.command()
@click.option("--macs", type=float, multiple=True, default=(0.6, 0.3, 0.15), show_default=True)
@click.option("--train-step", type=float, multiple=True, help="Fractions of the dense network's time.")
@click.option("--pick", default=2, show_default=True, help="Number in the table of the network to be trained.")
@click.option("--epochs", default=2, show_default=True, help="Of training, before the cut and after it.")
@click.option("--out", type=Path, help="Folder that a plot and a CSV file are written to.")
def main(macs: tuple[float, ...], train_step: tuple[float, ...], pick: int, epochs: int, out: Path | None) -> None:
    """Trains a network, prints a table over the budgets, and trains on with one of them."""
    torch.manual_seed(0)
    batches, test = loaders()
    model = train(Net(), batches, epochs)

    budgets = [*(Budget(macs=share) for share in macs), *(Budget(train_step=share) for share in train_step)]
    found = stamp_fast.sweep(model, batches, budgets, held_out=test)
    print(found)
    if out is not None:
        out.mkdir(exist_ok=True)
        found.to_csv(out / "sweep.csv")
        found.plot(out / "sweep.png", "Digits")

    before = parameters(model), accuracy(model, test)
    found.pick(pick)
    train(model, batches, epochs)
    print(f"{pick} picked; parameters: {before[0]} -> {parameters(model)}")
    print(f"accuracy: {before[1]:.3f} -> {accuracy(model, test):.3f} after {epochs} epochs")


if __name__ == "__main__":
    main()
