"""Several budgets from one pass of statistics: what does each fraction of the MACs cost in accuracy?

    python examples/budgets.py
    python examples/budgets.py --macs 0.8 --macs 0.4 --macs 0.1 --epochs 10

The network is traced once and scored once. Every budget is then a choice among the same scores: it is looked at in the
dense network, virtually compacted, before a copy is cut for good.
"""

from __future__ import annotations

import copy

import click
import torch
from digits import Net, accuracy, loaders, train
from torch import nn
from torch.nn import functional as F

from stamp_fast import Budget, importance, trace
from stamp_fast.recalibrate import recalibrate
from stamp_fast.report import compare_steps


def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@click.command()
@click.option("--macs", "fractions", multiple=True, type=float, default=(0.6, 0.3, 0.15), show_default=True)
@click.option("--epochs", default=2, show_default=True, help="Of training, before the cut and after it.")
@click.option("--seed", default=0, show_default=True)
def main(fractions: tuple[float, ...], epochs: int, seed: int) -> None:
    """Trains a network, scores its channels once, and prints a table over the budgets."""
    torch.manual_seed(seed)
    batches, test = loaders()
    model = train(Net(), batches, epochs)
    example = next(iter(batches))

    graph = trace(model, example[0])
    graph.settle()  # mends sizes that the forward holds; before `select`, for it numbers classes anew
    scores = importance.taylor(graph, [example, *batches][:8], loss)

    choices = {"dense": graph.all_kept()}
    for fraction in sorted(fractions, reverse=True):
        choices[f"{fraction:g}"] = graph.select(scores, Budget(macs=fraction), floor=0.1)

    networks, rows = [], []
    for name, keep in choices.items():
        with graph.masked(keep):  # nothing is cut yet, and dead channels are not computed
            recalibrate(model, [example], loss)  # of copies of the batch norms' buffers
            at_once = accuracy(model, test)
        small = copy.deepcopy(model)
        graph_of_copy = trace(small, example[0])
        graph_of_copy.settle()  # the same network, so the same classes in the same order
        graph_of_copy.compact(keep)
        networks.append(train(small, batches, epochs))
        rows.append((name, graph.macs(keep), graph.params(keep), at_once, accuracy(small, test)))

    costs = compare_steps(networks, example, loss)  # in turns, on this machine; it trains them on
    titles = ("MACs asked", "MACs", "parameters", "step ms", "at once", "trained", "on front")
    print(" ".join(f"{title:>10}" for title in titles))
    for row, cost in zip(rows, costs, strict=True):
        name, macs, params, at_once, trained = row
        beaten = any(other[1] < macs and other[4] >= trained for other in rows)
        cells = (name, macs, params, f"{cost.milliseconds:.1f}", f"{at_once:.3f}", f"{trained:.3f}")
        print(" ".join(f"{cell:>10}" for cell in (*cells, "no" if beaten else "yes")))


if __name__ == "__main__":
    main()
