"""A pretrained network on new data: prune it for the data, train what is left, say what was done.

    python examples/fine_tune.py
    python examples/fine_tune.py --macs 0.2 --method taylor --steps 400

The network is the small one that the package ships, pretrained on rendered glyphs; yours may come from torchvision or
timm. All that matters is a head for the new classes.
"""

from __future__ import annotations

import itertools

import click
import torch
from digits import accuracy, loaders, parameters
from torch.nn import functional as F

import stamp_fast
from stamp_fast.demo.network import pretrained_for


@click.command()
@click.option("--macs", default=0.35, show_default=True, help="Multiply-accumulates that may stay, as a fraction.")
@click.option("--method", default="stamp", show_default=True, help="stamp, taylor, magnitude, bn_scale or random.")
@click.option("--steps", default=40, show_default=True, help="Of fine-tuning; an epoch is 40 of them.")
@click.option("--seed", default=0, show_default=True)
def main(macs: float, method: str, steps: int, seed: int) -> None:
    """Prunes for the digits and fine-tunes."""
    torch.manual_seed(seed)
    train, test = loaders(size=32)
    model = pretrained_for(num_classes=10, seed=seed)
    before = parameters(model)

    # The same object comes back, smaller. Make the optimizer afterwards, or hand it to prune.
    stamp_fast.prune(model, train, budget=stamp_fast.Budget(macs=macs), method=method, seed=seed)
    print(stamp_fast.report(model))
    print(f"parameters: {before} -> {parameters(model)}")
    print(f"accuracy after pruning: {accuracy(model, test):.3f}")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    model.train()
    batches = itertools.chain.from_iterable(itertools.repeat(train))
    for images, labels in itertools.islice(batches, steps):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"accuracy after {steps} steps: {accuracy(model, test):.3f}")


if __name__ == "__main__":
    main()
