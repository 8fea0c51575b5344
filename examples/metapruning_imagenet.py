"""MetaPruning on ImageNet, as the paper has it (arXiv 1903.10258): PruningNet, search, retraining.

    torchrun --nproc-per-node 8 examples/metapruning_imagenet.py /data/imagenet --network resnet50 --macs 0.5

/data/imagenet holds train/CLASS/*.JPEG and val/CLASS/*.JPEG. Of the training images 50 of every class are held out:
the search scores on them, so that the test images stay unseen. Everything is kept in --out and goes on from there when
the command is run again. The paper's numbers of epochs, batch sizes and rates are the defaults; 8 GPUs took its authors
three days. A look at the whole road within a minute, without data or GPU:

    python examples/metapruning_imagenet.py --fake --out /tmp/metapruning
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from pathlib import Path

import click
import torch
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset, TensorDataset

from stamp_fast import Budget
from stamp_fast.metapruning import Genome, PruningNet, search, spaces


@dataclasses.dataclass(frozen=True)
class Recipe:
    """As in the paper's code. Batch sizes are of all processes together.

    Attributes:
        fit, retrain: epochs, batch size, first learning rate.
        milestones: fractions of the retraining after which the rate falls to a tenth; none: it falls in a line.
        weight_decay: of the retraining.
        at_least: genomes that use less of the budget are dropped.
    """

    fit: tuple[int, int, float]
    retrain: tuple[int, int, float]
    milestones: tuple[float, ...] = ()
    weight_decay: float = 4e-5
    at_least: float = 0.0


_MOBILE = Recipe(fit=(64, 512, 0.25), retrain=(256, 1024, 0.5))
RECIPES = {
    "mobilenet_v1": _MOBILE,
    "mobilenet_v2": _MOBILE,
    "resnet50": Recipe((32, 256, 0.1), (128, 512, 0.2), (0.25, 0.5, 0.75), weight_decay=1e-4, at_least=0.95),
}


def images(root: Path, size: int = 224) -> dict[str, Dataset]:
    """Training, held-out and test images; the held-out ones also as they are trained on, for the batch norms."""
    from torchvision import datasets, transforms

    normal = transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    crop = [
        transforms.RandomResizedCrop(size),
        transforms.RandomHorizontalFlip(),
        transforms.ColorJitter(0.1, 0.1, 0.1),
    ]
    augmented = transforms.Compose([*crop, transforms.ToTensor(), normal])
    centered = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(size), transforms.ToTensor(), normal])
    train = datasets.ImageFolder(root / "train", augmented)
    still = datasets.ImageFolder(root / "train", centered)
    seen: dict[int, int] = {}
    held, rest = [], []
    for index in torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist():
        label = train.targets[index]
        seen[label] = seen.get(label, 0) + 1
        (held if seen[label] <= 50 else rest).append(index)
    test = datasets.ImageFolder(root / "val", centered)
    return {"train": Subset(train, rest), "held_out": Subset(still, held), "all": train, "test": test}


def fake_images() -> dict[str, Dataset]:
    """Noise, for a test of the road."""
    draw = torch.Generator().manual_seed(0)

    def some(count: int) -> TensorDataset:
        return TensorDataset(torch.randn(count, 3, 64, 64, generator=draw), torch.randint(10, (count,), generator=draw))

    return {"train": some(16), "held_out": some(8), "all": some(16), "test": some(8)}


def loader(dataset: Dataset, batch_size: int, workers: int, train: bool = True) -> DataLoader:
    """Of this process's share of the training images, or of all others."""
    share = DistributedSampler(dataset) if train and distributed.is_initialized() else None
    size = max(2, batch_size // world()) if train else batch_size
    return DataLoader(dataset, size, train and share is None, share, num_workers=workers, drop_last=train)


def world() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def is_first() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


class Retraining:
    """The winner from scratch: SGD with label smoothing."""

    def __init__(self, genome: Genome, recipe: Recipe, epochs: int, device: torch.device) -> None:
        torch.manual_seed(0)
        _, batch_size, lr = recipe.retrain
        self.recipe, self.epochs, self.batch_size, self.lr = recipe, epochs, batch_size, lr
        self.model = genome.build(_init).to(device, memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(_groups(self.model, recipe.weight_decay), lr, momentum=0.9)

    def run(self, data: dict[str, Dataset], workers: int, out: Path) -> float:
        """Accuracy on the test images at the end; goes on from the last epoch that was kept."""
        device = next(self.model.parameters()).device
        trained = nn.parallel.DistributedDataParallel(self.model) if world() > 1 else self.model
        batches = loader(data["all"], self.batch_size, workers)
        path = out / "retraining.pt"
        first = 0
        if path.exists():
            state = torch.load(path, map_location=device, weights_only=True)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            first = state["epochs"]
        for epoch in range(first, self.epochs):
            if isinstance(batches.sampler, DistributedSampler):
                batches.sampler.set_epoch(epoch)
            trained.train()
            for step, (inputs, labels) in enumerate(batches):
                for group in self.optimizer.param_groups:
                    group["lr"] = self.lr * self._share((epoch + step / len(batches)) / self.epochs)
                inputs = inputs.to(device, memory_format=torch.channels_last)
                F.cross_entropy(trained(inputs), labels.to(device), label_smoothing=0.1).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
            if is_first():
                state = {
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "epochs": epoch + 1,
                }
                torch.save(state, out / "writing")
                os.replace(out / "writing", path)
        self.model.eval()
        right = total = 0
        with torch.no_grad():
            for inputs, labels in loader(data["test"], 256, workers, train=False):
                right += (self.model(inputs.to(device)).argmax(1).cpu() == labels).sum().item()
                total += len(labels)
        return right / total

    def _share(self, done: float) -> float:
        if not self.recipe.milestones:
            return 1 - done
        return 0.1 ** sum(done >= milestone for milestone in self.recipe.milestones)


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """No decay of batch norms, biases and depthwise filters."""
    decayed = [p for p in model.parameters() if p.dim() == 2 or (p.dim() == 4 and p.shape[1] > 1)]
    known = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in known]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


@click.command()
@click.argument("root", type=click.Path(path_type=Path, exists=True), required=False)
@click.option("--network", type=click.Choice(list(RECIPES)), default="mobilenet_v1", show_default=True)
@click.option("--macs", default=0.5, show_default=True, help="Fraction of the widest network.")
@click.option("--latency", type=float, help="In the place of MACs: fraction of the widest network's time.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("metapruning"), show_default=True)
@click.option("--held-out-batches", default=40, show_default=True, help="Of 250 images that genomes are scored on.")
@click.option("--workers", default=8, show_default=True, help="Processes that read images, for each GPU.")
@click.option("--fake", is_flag=True, help="Noise for images, and one epoch of everything.")
def main(
    root: Path | None,
    network: str,
    macs: float,
    latency: float | None,
    out: Path,
    held_out_batches: int,
    workers: int,
    fake: bool,
) -> None:
    """PruningNet, search and retraining; prints the widths that were found and their accuracy."""
    if (root is None) != fake:
        raise click.UsageError("give the folder of the images, or --fake")
    cuda = torch.cuda.is_available()
    if "RANK" in os.environ:
        distributed.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    out.mkdir(parents=True, exist_ok=True)
    recipe = RECIPES[network]
    data = fake_images() if fake else images(root)
    workers = 0 if fake else workers
    torch.manual_seed(0)
    arguments = getattr(spaces, network)(10 if fake else 1000)
    hidden = 64 if network == "mobilenet_v2" else 32
    if fake:
        hidden, recipe = 2, dataclasses.replace(recipe, fit=(1, 4, 0.1), retrain=(1, 4, 0.1), at_least=0.0)
    net = PruningNet(arguments.pop("model").to(device), hidden=hidden, **arguments)
    epochs, batch_size, lr = recipe.fit
    path = out / "pruning_net.safetensors"
    net.fit(loader(data["train"], batch_size, workers), epochs=epochs, lr=lr, checkpoint=path, progress=is_first())
    torch.manual_seed(0)  # the same crops in every process, and when the command is run again
    calibration = list(itertools.islice(loader(data["train"], 250, workers, train=False), 80))
    held_out = itertools.islice(loader(data["held_out"], 250, workers, train=False), held_out_batches)
    budget = Budget(macs=macs) if latency is None else Budget(latency=latency)
    out = out / f"macs-{macs:g}" if latency is None else out / f"latency-{latency:g}"
    out.mkdir(exist_ok=True)
    if latency is not None:
        from stamp_fast.cost_table import CostTable

        inputs = calibration[0][0][:32].to(device)
        net.space.graph.cost_table = CostTable(net.space.graph, inputs, path=path.with_name("costs.jsonl"))
    sizes = {"population": 4, "mutations": 2, "crossovers": 2, "parents": 2, "generations": 2} if fake else {}
    genome = search(
        *(net, calibration, held_out),
        budget=budget,
        at_least=recipe.at_least,
        checkpoint=path.with_name("scores.jsonl"),  # they do not depend on the budget
        progress=is_first(),
        **sizes,
    )
    if is_first():
        (out / "genome.json").write_text(genome.to_json())
        click.echo(f"{genome.widths()}: {genome.macs() / 1e6:.0f} million multiply-accumulates")
    accuracy = Retraining(genome, recipe, recipe.retrain[0], device).run(data, workers, out)
    if is_first():
        click.echo(f"accuracy {accuracy:.1%}")
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
