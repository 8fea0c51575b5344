"""The demo: a network pretrained on glyphs learns handwritten digits, once whole and once pruned for them."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.table import Table
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import stamp_fast
from stamp_fast.demo import digits
from stamp_fast.demo.network import GENERATOR, pretrained_for
from stamp_fast.demo.plot import write_figure

EVALUATIONS_PER_EPOCH = 2
HOLD = 3  # evaluations in a row that an accuracy must be seen in to count as reached: one may be luck


@dataclass
class Arm:
    """One of the two fine-tuning runs. Point i of the curve is (seconds[i], accuracy[i], test_loss[i])."""

    name: str
    params: int
    macs: int
    peak_memory: int = 0  # of a train step, in bytes; 0 where it was not measured
    prune_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)  # training, and pruning, up to this point
    accuracy: list[float] = field(default_factory=list)
    test_loss: list[float] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)  # one value per step
    step_ms: list[float] = field(default_factory=list)  # forward, backward, optimizer; one value per step

    @property
    def median_step_ms(self) -> float:
        return statistics.median(self.step_ms)

    @property
    def held(self) -> list[float]:
        """For every point of the curve the accuracy that it and the next two all reach."""
        last = max(1, len(self.accuracy) - HOLD + 1)
        return [min(self.accuracy[i : i + HOLD]) for i in range(last)]

    def seconds_to(self, target: float) -> float:
        """Seconds until `target` is reached and held."""
        return next(s for s, a in zip(self.seconds, self.held, strict=False) if a >= target)


@dataclass
class DemoResult:
    method: str
    dense: Arm
    pruned: Arm
    target: float  # an accuracy that both arms reach and hold
    layers: list[tuple[str, int, int]]  # name, channels before, channels after
    report: object  # stamp_fast.report(model) of the pruned network
    figure: Path


@torch.no_grad()
def evaluate(model: nn.Module, dataset: TensorDataset) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    images, targets = dataset.tensors
    model.eval()
    logits = torch.cat([model(batch) for batch in images.split(250)])
    model.train()
    return (logits.argmax(1) == targets).float().mean().item(), F.cross_entropy(logits, targets).item()


def fine_tune(
    arm: Arm, model: nn.Module, loader: DataLoader, test: TensorDataset, epochs: int, lr: float
) -> Iterator[None]:
    """Fine-tunes up to the next evaluation per `next`. Evaluation does not count as time."""
    steps = epochs * len(loader)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = LambdaLR(optimizer, lambda step: warm_up_and_cosine(step, steps))
    every = max(1, len(loader) // EVALUATIONS_PER_EPOCH)
    spent = arm.prune_seconds

    def look() -> None:
        accuracy, loss = evaluate(model, test)
        arm.seconds.append(spent)
        arm.accuracy.append(accuracy)
        arm.test_loss.append(loss)

    look()
    model.train()
    for _ in range(epochs):
        resumed = time.perf_counter()
        for index, (inputs, targets) in enumerate(loader, 1):
            started = time.perf_counter()
            loss = F.cross_entropy(model(inputs), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            arm.step_ms.append((time.perf_counter() - started) * 1e3)
            schedule.step()
            arm.train_loss.append(loss.item())
            if index % every == 0 or index == len(loader):
                spent += time.perf_counter() - resumed
                look()
                yield
                resumed = time.perf_counter()


def warm_up(model: nn.Module, loader: DataLoader) -> None:
    """One step on a copy: what a process pays once must not be charged to the arm that goes first."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)  # the first one imports half of torch.compile
    inputs, targets = next(iter(loader))
    F.cross_entropy(model(inputs), targets).backward()
    optimizer.step()


def channels(model: nn.Module) -> dict[str, int]:
    return {name: m.out_channels for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}


def count_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def warm_up_and_cosine(step: int, steps: int) -> float:
    """Learning rate as a fraction of its peak: a linear rise over the first fifth, then half a cosine."""
    rise = max(1, steps // 5)
    if step < rise:
        return (step + 1) / (rise + 1)
    return (1 + math.cos(math.pi * (step - rise) / (steps - rise + 1))) / 2


def run(
    method: str = "stamp",
    *,
    budget: float = 0.35,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 0.02,
    steps: int = 20,
    train_images: int | None = None,
    seed: int = 0,
    output: Path = Path("stamp_fast_demo.png"),
    console: Console | None = None,
    progress: bool = True,
) -> DemoResult:
    """Fine-tunes the pretrained network on digits whole and pruned, prints a table, draws a figure.

    Both arms start from the same weights and the same fresh head, see the same batches, and use the same
    optimizer and learning rate schedule. They take turns every few steps, so a slow moment of the machine hits
    both. The pruned arm's time includes `prune`.

    Args:
        method: How channels are scored, one of `stamp_fast.methods.METHODS`.
        budget: Multiply-accumulates of the pruned network as a fraction of the whole one.
        epochs: Epochs of fine-tuning in each arm.
        batch_size: Batch size of fine-tuning and of the batches handed to `prune`.
        lr: Peak learning rate of the schedule.
        steps: Steps that `prune` may take.
        train_images: Use only the first so many training images.
        seed: Seeds the fresh head, the order of the batches, and `prune`.
        output: Where the figure goes, a PNG.
        console: Where the table goes; the terminal if not given.
        progress: Show a progress bar.
    """
    console = console or Console()
    train, test = digits.datasets()
    if train_images is not None:
        train = TensorDataset(*(tensor[:train_images] for tensor in train.tensors))

    dense_model = pretrained_for(digits.NUM_CLASSES, seed)
    pruned_model = copy.deepcopy(dense_model)
    warm_up(dense_model, digits.train_loader(train, batch_size, seed))

    started = time.perf_counter()
    pruned_model = stamp_fast.prune(
        pruned_model,
        digits.train_loader(train, batch_size, seed),
        budget=stamp_fast.Budget(macs=budget),
        method=method,
        generator=GENERATOR if method == "stamp" else None,
        steps=steps,
        round_to=8,
        seed=seed,
        progress=progress,
    )
    prune_seconds = time.perf_counter() - started
    report = stamp_fast.report(pruned_model)

    dense = Arm("whole", count_params(dense_model), report.macs_before, report.peak_memory_before)
    pruned = Arm("pruned", count_params(pruned_model), report.macs_after, report.peak_memory_after)
    pruned.prune_seconds = prune_seconds
    arms = [
        fine_tune(arm, model, digits.train_loader(train, batch_size, seed), test, epochs, lr)
        for arm, model in ((dense, dense_model), (pruned, pruned_model))
    ]
    columns = (TextColumn("fine-tuning, both arms"), BarColumn(), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True, disable=not progress) as bar:
        for _ in bar.track(zip(*arms, strict=True), total=epochs * EVALUATIONS_PER_EPOCH):
            pass

    before, after = channels(dense_model), channels(pruned_model)
    result = DemoResult(
        method=method,
        dense=dense,
        pruned=pruned,
        target=min(max(dense.held), max(pruned.held)) - 0.005,
        layers=[(name, before[name], after.get(name, 0)) for name in before],
        report=report,
        figure=output,
    )
    write_figure(result, output)
    console.print(table(result))
    console.print(f"figure: {output}")
    return result


def table(result: DemoResult) -> Table:
    """Whole beside pruned. The last column is red where the pruned network is the worse one."""
    dense, pruned = result.dense, result.pruned
    count = torch.get_num_threads()
    threads = f"{count} thread{'s' if count > 1 else ''}"
    view = Table(title=f"glyphs -> cluttered handwritten digits, method {result.method}, {threads}")
    view.add_column("")
    for heading in ("whole", "pruned", "pruned against whole"):
        view.add_column(heading, justify="right")

    def colour(better: bool, worse: bool, text: str) -> str:
        return f"[green]{text}[/]" if better else f"[red]{text} (worse)[/]" if worse else text

    def smaller_is_better(name: str, text: str, before: float, after: float) -> None:
        if min(before, after) <= 0:
            word = ""
        else:
            word = f"{before / after:.2f}x less" if after <= before else f"{after / before:.2f}x more"
        view.add_row(name, text.format(before), text.format(after), colour(after < before, after > before, word))

    def accuracy(name: str, before: float, after: float) -> None:
        points = round(100 * (after - before), 1)
        text = colour(points > 0, points < 0, f"{points:+.1f} points")
        view.add_row(name, f"{before:.1%}", f"{after:.1%}", text)

    accuracy("test accuracy, best", max(dense.accuracy), max(pruned.accuracy))
    accuracy("test accuracy, last", dense.accuracy[-1], pruned.accuracy[-1])
    smaller_is_better("test loss, last", "{:.4f}", dense.test_loss[-1], pruned.test_loss[-1])
    smaller_is_better("MACs per image", "{:,.0f}", dense.macs, pruned.macs)
    smaller_is_better("parameters", "{:,.0f}", dense.params, pruned.params)
    smaller_is_better("train step, median", "{:.1f} ms", dense.median_step_ms, pruned.median_step_ms)
    if min(dense.peak_memory, pruned.peak_memory) > 0:
        smaller_is_better(
            "train step, peak memory", "{:.1f} MiB", dense.peak_memory / 2**20, pruned.peak_memory / 2**20
        )
    view.add_row("time in prune()", "-", f"{pruned.prune_seconds:.2f} s", "")
    smaller_is_better("all epochs, with prune()", "{:.1f} s", dense.seconds[-1], pruned.seconds[-1])
    reached = [arm.seconds_to(result.target) for arm in (dense, pruned)]
    smaller_is_better(f"time to {result.target:.1%}, with prune()", "{:.1f} s", *reached)
    return view
