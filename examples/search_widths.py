"""How wide should each layer be? MetaPruning on a small network: PruningNet, search, training from scratch.

    python examples/search_widths.py
    python examples/search_widths.py --fit-epochs 30 --epochs 10 --population 30 --generations 10

The defaults show the road and no more: with so short trainings differences of a few points are chance.
`examples/metapruning_imagenet.py` has the paper's recipe for ImageNet.
"""

from __future__ import annotations

import itertools

import click
import torch
from digits import Net, accuracy, loaders, parameters, train

from stamp_fast import Budget
from stamp_fast.metapruning import PruningNet, search


@click.command()
@click.option("--macs", default=0.4, show_default=True, help="Fraction of the widest network.")
@click.option("--fit-epochs", default=4, show_default=True, help="Of PruningNet.")
@click.option("--epochs", default=4, show_default=True, help="Of the networks that are trained from scratch.")
@click.option("--population", default=8, show_default=True)
@click.option("--generations", default=3, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(macs: float, fit_epochs: int, epochs: int, population: int, generations: int, seed: int) -> None:
    """Searches for widths within the budget, and trains them beside uniform ones."""
    torch.manual_seed(seed)
    batches, test = loaders()
    *for_training, held_out_1, held_out_2 = list(batches)  # the search must not see the test images

    widest = Net()
    net = PruningNet(widest, for_training[0][0][:2])
    net.fit(for_training, epochs=fit_epochs, lr=0.1, seed=seed)
    budget = Budget(macs=macs)
    offspring = {"parents": population // 2, "mutations": population // 2, "crossovers": population // 2}
    calibration = list(itertools.islice(for_training, 4))
    genome = search(
        *(net, calibration, [held_out_1, held_out_2]),
        budget=budget,
        at_least=0.9,
        population=population,
        generations=generations,
        seed=seed,
        **offspring,
    )
    print(f"parameters: {parameters(widest)} -> {genome.params()}")
    for name, found in (("searched", genome), ("uniform", net.space.uniform(budget))):
        share = found.macs() / net.space.largest.macs()
        torch.manual_seed(seed)
        reached = accuracy(train(found.build(), batches, epochs), test)
        print(f"{name}: widths {list(found.widths().values())}, {share:.2f} of the MACs, accuracy {reached:.3f}")


if __name__ == "__main__":
    main()
