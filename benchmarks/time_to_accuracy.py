"""Accuracy against seconds: a pretrained network on a new data set, whole and pruned in every way that people know.

    python -m benchmarks.time_to_accuracy                     # all of it: hours
    python -m benchmarks.time_to_accuracy --network vgg --target fashion --macs 0.125 --seeds 1
    python -m benchmarks.time_to_accuracy --target cifar10 --root ~/data
    python -m benchmarks.accuracy_table                       # table, CSV and figures of what there is

Rows are appended to a JSON-lines file as they come; what it holds already is not run again. All arms start from the
same pretrained weights and the same fresh head, see the same batches and follow the same schedule in the same
precision. Before every evaluation batch norm's statistics are taken anew, for all arms alike; evaluations cost no time.
With one thread the seconds are those that the CPU worked, so that what else runs on the machine does not count.
STAMP's steps of adaptation are not counted as steps of fine-tuning; their seconds are counted.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import stamp_fast
from stamp_fast import Budget, importance, trace
from stamp_fast.recalibrate import recalibrate
from stamp_fast.report.measure import compare_steps
from stamp_fast.stamp import MaskGenerator

from . import data
from .machine import machine_info
from .reference import NETWORKS, generator_for, pretrained_for

__all__ = [
    "ARMS",
    "MARKS",
    "RESULTS",
    "ROUND_TO",
    "Task",
    "hit_rate",
    "loss",
    "now",
    "rows",
    "run",
    "timed_prune",
    "torch_pruned",
]

MARKS = (0, 25, 50, 100, 200, 400, 1000)
ROUND_TO = 8  # widths of every arm: others cost more time than they save MACs
_TAYLOR_BATCHES = 8  # as many as stamp_fast's own Taylor takes
_BATCH = 64
_TEST_IMAGES = 3000
RESULTS = Path(__file__).parent / "results" / "time_to_accuracy.jsonl"


@dataclasses.dataclass(frozen=True)
class Task:
    """One place of the experiment, the same for all arms."""

    network: str
    target: str
    macs: float
    seed: int
    steps: int
    lr: float = 0.05
    root: Path | None = None

    def batches(self, count: int) -> list[tuple[Tensor, Tensor]]:
        return data.batches(data.target(self.target, self.root)[0], _BATCH, count, self.seed)

    def dense(self) -> nn.Module:
        """Pretrained, with a fresh head for the target's classes."""
        classes = int(data.target(self.target, self.root)[0].tensors[1].max()) + 1
        return pretrained_for(self.network, classes, self.seed)


# Gives the network that is fine-tuned then, and the seconds that making it took.
Arm = Callable[[Task, list], tuple[nn.Module, float]]


def precision() -> contextlib.AbstractContextManager:
    """bfloat16 under autocast, the fast path on CPUs that have it; the same for every arm."""
    return torch.autocast("cpu", torch.bfloat16)


def loss(model: nn.Module, batch: Any) -> Tensor:
    with precision():
        logits = model(batch[0])
    return F.cross_entropy(logits.float(), batch[1])


# --- arms -------------------------------------------------------------------------------------------------------------
def now() -> float:
    """Seconds; with one thread those in which it ran, which are wall seconds wherever it has a core to itself."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(make: Callable[[], nn.Module]) -> tuple[nn.Module, float]:
    """What it makes, and the seconds that took."""
    begin = now()
    model = make()
    return model, now() - begin


def _whole(task: Task, batches: list) -> tuple[nn.Module, float]:
    return task.dense(), 0.0


def pruned_by(method: str, generator: Callable[[Task], MaskGenerator] | None = None, **options: Any) -> Arm:
    def arm(task: Task, batches: list) -> tuple[nn.Module, float]:
        budget = Budget(macs=task.macs)
        more = options if generator is None else {"generator": generator(task), **options}
        more |= {"budget": budget, "loss_fn": loss, "round_to": ROUND_TO, "seed": task.seed, "progress": False}
        dense = task.dense()
        if method == "stamp":
            return timed(lambda: stamp_fast.prune(dense, batches, method=method, **more))
        return timed_prune(dense, batches, method=method, **more)

    return arm


def timed_prune(model: nn.Module, batches: list, **options: Any) -> tuple[nn.Module, float]:
    """Of a baseline the work counts, not the looking, which nobody else does: comparing outputs, measuring steps."""
    with mock.patch.object(sys.modules["stamp_fast.prune"], "measured", return_value=None):
        return timed(lambda: stamp_fast.prune(model, batches, verify=False, **options))


def _global_magnitude(task: Task, batches: list) -> tuple[nn.Module, float]:
    model = task.dense()

    def pruned() -> nn.Module:
        graph = trace(model, batches[0][0][:2])
        graph.settle()
        # Norms of different layers are comparable only after each layer's mean is taken out (as Torch-Pruning does).
        scores = importance.magnitude(graph, p=2)
        for group in graph.groups:
            scores[group.classes] /= scores[group.classes].mean()
        budget = Budget(macs=task.macs)
        return graph.compact(graph.select(scores, budget, ranking="global", round_to=ROUND_TO, floor=0.1))

    return timed(pruned)


def _scratch(task: Task, batches: list) -> tuple[nn.Module, float]:
    """The widths of uniform magnitude, all weights drawn anew."""
    model, _ = pruned_by("magnitude")(task, batches)
    torch.manual_seed(task.seed)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return model, 0.0


def torch_pruned(model: nn.Module, batches: list, share: float, taylor: bool) -> tuple[nn.Module, float]:
    """What Torch-Pruning makes of a network, and the seconds that took.

    It has no budget in MACs, and with `round_to` more may stay where less is asked for: all ratios are tried, which is
    not timed, and the one taken that comes closest.
    """
    import torch_pruning as tp

    example = batches[0][0][:1]
    dense = tp.utils.count_ops_and_params(model, example)[0]

    def pruned(ratio: float) -> nn.Module:
        small = copy.deepcopy(model)
        if taylor:
            for batch in batches[:_TAYLOR_BATCHES]:
                loss(small.train(), batch).backward()
        head = [m for m in small.modules() if isinstance(m, nn.Linear)][-1:]
        kind = tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2)
        pruner = tp.pruner.MagnitudePruner(
            small.eval(), example, importance=kind, pruning_ratio=ratio, ignored_layers=head, round_to=ROUND_TO
        )
        pruner.step()
        small.zero_grad(set_to_none=True)
        return small

    def macs(ratio: float) -> float:
        return tp.utils.count_ops_and_params(pruned(ratio), example)[0] / dense

    ratio = min((step / 50 for step in range(50)), key=lambda ratio: abs(macs(ratio) - share))
    return timed(lambda: pruned(ratio))


def _torch_pruning(taylor: bool) -> Arm:
    return lambda task, batches: torch_pruned(task.dense(), batches, task.macs, taylor)


ARMS: dict[str, Arm] = {
    "dense": _whole,
    "scratch": _scratch,
    "random": pruned_by("random"),
    "uniform L1": pruned_by("magnitude"),
    "global L2": _global_magnitude,
    "Taylor": pruned_by("taylor"),
    "Torch-Pruning L2": _torch_pruning(taylor=False),
    "Torch-Pruning Taylor": _torch_pruning(taylor=True),
    "STAMP, no generator": pruned_by("stamp"),
    "STAMP, structure": pruned_by("stamp", generator=lambda task: generator_for(task.network, "structure")),
    "STAMP, joint": pruned_by("stamp", generator=lambda task: generator_for(task.network, "joint")),
    "STAMP, 0 steps": pruned_by("stamp", steps=0, generator=lambda task: generator_for(task.network, "joint")),
}


# --- the run ----------------------------------------------------------------------------------------------------------
def run(name: str, task: Task, arm: Arm | None = None) -> dict[str, Any]:
    """One arm, by default the one of that name: accuracy at the marks, seconds until then, cost of a step."""
    batches = task.batches(task.steps)
    model, pruning = (arm or ARMS[name])(task, batches[:20])
    spent = pruning
    model.to(memory_format=torch.channels_last).train()
    step = compare_steps([copy.deepcopy(model)], batches[0], loss)[0]
    optimizer = torch.optim.SGD(model.parameters(), task.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    curve = [(0, spent, accuracy(model, task))]
    for number, (inputs, labels) in enumerate(batches, 1):
        begin = now()
        for group in optimizer.param_groups:
            group["lr"] = task.lr * min(1, number / 20) * (1 + math.cos(math.pi * (number - 1) / task.steps)) / 2
        value = loss(model, (inputs.contiguous(memory_format=torch.channels_last), labels))
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        optimizer.step()
        spent += now() - begin
        if number in MARKS or number == task.steps:
            curve.append((number, spent, accuracy(model, task)))
    dense = task.dense()
    example = batches[0][0][:2]
    return {
        "arm": name,
        **{name: value for name, value in dataclasses.asdict(task).items() if name != "root"},
        "pruning_seconds": pruning,
        "curve": curve,
        "step_ms": step.milliseconds,
        "peak_bytes": step.peak_bytes,
        "macs_reached": trace(model, example).macs() / trace(dense, example).macs(),
    }


@torch.no_grad()
def accuracy(model: nn.Module, task: Task) -> float:
    """On the first test images, after batch norm's statistics were taken anew from training images."""
    model = copy.deepcopy(model)
    recalibrate(model, task.batches(6), loss)
    return hit_rate(model, data.target(task.target, task.root)[1], _TEST_IMAGES)


@torch.no_grad()
def hit_rate(model: nn.Module, dataset: TensorDataset, count: int) -> float:
    """Share of the first `count` examples that the model names rightly; it is put into eval mode."""
    model.eval()
    images, labels = (part[:count] for part in dataset.tensors)
    with precision():
        hits = [
            model(part.contiguous(memory_format=torch.channels_last)).argmax(1) == goal
            for part, goal in zip(images.split(500), labels.split(500), strict=True)
        ]
    return torch.cat(hits).float().mean().item()


def rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a results file; the first line says what it was made on."""
    if path.exists():
        yield from map(json.loads, path.read_text().splitlines()[1:])


@click.command()
@click.option("--network", "networks", multiple=True, default=tuple(NETWORKS), type=click.Choice(list(NETWORKS)))
@click.option("--target", "targets", multiple=True, default=data.SHIPPED, type=click.Choice(list(data.TARGETS)))
@click.option("--root", type=click.Path(path_type=Path), help="A folder, for data that torchvision downloads.")
@click.option("--macs", multiple=True, type=float, default=(0.5, 0.25, 0.125))
@click.option("--arm", "arms", multiple=True, default=tuple(ARMS), type=click.Choice(list(ARMS)))
@click.option("--seeds", default=3, show_default=True)
@click.option("--steps", default=1200, show_default=True, help="The full schedule.")
@click.option("--lr", default=0.05, show_default=True, help="The highest of the schedule, for every arm.")
@click.option("--threads", default=1, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS)
def main(
    networks: tuple,
    targets: tuple,
    root: Path | None,
    macs: tuple,
    arms: tuple,
    seeds: int,
    steps: int,
    lr: float,
    threads: int,
    results: Path,
) -> None:
    """Run the arms that the results do not hold yet."""
    torch.set_num_threads(threads)
    if not results.exists():
        results.write_text(json.dumps({"machine": machine_info(threads)}) + "\n")
    keys = ("arm", "network", "target", "macs", "seed", "steps", "lr")
    done = {tuple(row[k] for k in keys) for row in rows(results)}
    for seed in range(seeds):
        for network in networks:
            for target in targets:
                for share in macs:
                    for name in arms:
                        share_of = 1.0 if name == "dense" else share
                        if (name, network, target, share_of, seed, steps, lr) in done:
                            continue
                        row = run(name, Task(network, target, share_of, seed, steps, lr, root=root))
                        done.add(tuple(row[k] for k in keys))
                        with results.open("a") as file:
                            file.write(json.dumps(row) + "\n")
                        last = row["curve"][-1]
                        click.echo(
                            f"{network} {target} {share_of:g} seed {seed} {name}: {last[2]:.1%} in {last[1]:.0f} s"
                        )


if __name__ == "__main__":
    main()
