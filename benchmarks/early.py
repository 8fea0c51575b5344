"""Training from scratch, made cheaper by pruning: at the start, on the way, or half way with fine-tuning after.

    python -m benchmarks.early                         # all of it: hours
    python -m benchmarks.early --network resnet18 --seeds 1
    python -m benchmarks.early --scan                  # accuracy against the epoch of the cut
    python -m benchmarks.early --table                 # docs/early.md and figures of what there is

Rows are appended to a JSON-lines file as they come; what it holds already is not run again. All arms see the same
batches in the same order and train as many of them, at one learning rate and schedule (train-prune-fine-tune: two, of
half the length each). Accuracy on test images with the running statistics of training. Seconds include pruning and
leave out evaluation; with one thread they are those that it worked.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from stamp_fast import Budget, trace
from stamp_fast.early import EarlyPruner, Scan, scan
from stamp_fast.report.measure import compare_steps

from . import data
from .machine import machine_info
from .networks import cifar_mobilenet, cifar_resnet18
from .table import markdown_table
from .time_to_accuracy import ROUND_TO, hit_rate, loss, now, rows, timed_prune, torch_pruned

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: cifar_resnet18((24, 48, 96, 192)),
    "mobilenet": lambda: cifar_mobilenet(16),
}
_MACS = 0.25
_EPOCHS = 120
_STEPS = 20  # an epoch
_BATCH = 32
_LR = 0.05
_TEST_IMAGES = 5000
_OUT = Path(__file__).parent / "results"
_DOCS = Path(__file__).parent.parent / "docs"


class Training:
    """One network on its way through the epochs: what every arm shares."""

    def __init__(self, network: str, seed: int, epochs: int = _EPOCHS) -> None:
        torch.manual_seed(seed)
        self.model = NETWORKS[network]().to(memory_format=torch.channels_last)
        self.seed, self.epochs, self.epoch, self.seconds = seed, epochs, 0, 0.0
        self.restart()

    def restart(self, epochs: int | None = None) -> None:
        """A fresh optimizer and schedule."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), _LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, _LR, (epochs or self.epochs) * _STEPS, pct_start=0.1, cycle_momentum=False
        )

    def timed(self, work: Callable[[], Any]) -> Any:
        begin = now()
        found = work()
        self.seconds += now() - begin
        return found

    def run_epoch(self, observe: Callable[[], Any] = lambda: None) -> None:
        self.epoch += 1
        batches = epoch_batches(self.seed, self.epoch)
        self.timed(lambda: train(self.model, self.optimizer, self.schedule, batches, observe))


def epoch_batches(seed: int, epoch: int) -> list:
    return data.batches(data.target("fashion")[0], _BATCH, _STEPS, 1000 * seed + epoch)


def train(model: nn.Module, optimizer: Any, schedule: Any, batches: list, observe: Callable[[], Any]) -> None:
    model.train()
    for inputs, labels in batches:
        loss(model, (inputs.contiguous(memory_format=torch.channels_last), labels)).backward()
        observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def accuracy(model: nn.Module) -> float:
    return hit_rate(copy.deepcopy(model), data.target("fashion")[1], _TEST_IMAGES)


# --- arms: each trains to the end and says in which epoch it cut ------------------------------------------------------
Arm = Callable[[Training], dict[str, Any]]


def dense(training: Training) -> dict[str, Any]:
    for _ in range(training.epochs):
        training.run_epoch()
    return {}


def at_start(method: str) -> Arm:
    def arm(training: Training) -> dict[str, Any]:
        batches = epoch_batches(training.seed, 1)
        options = {"budget": Budget(macs=_MACS), "loss_fn": loss, "round_to": ROUND_TO, "seed": training.seed}
        training.seconds += timed_prune(training.model, batches, method=method, progress=False, **options)[1]
        training.restart()
        return dense(training) | {"cut_epoch": 0}

    return arm


def then_fine_tuned(taylor: bool) -> Arm:
    """Half of the epochs to train, half to fine-tune, both with a whole schedule; Torch-Pruning cuts."""

    def arm(training: Training) -> dict[str, Any]:
        half = training.epochs // 2
        training.restart(half)
        for _ in range(half):
            training.run_epoch()
        batches = epoch_batches(training.seed, half)
        training.model, seconds = torch_pruned(training.model, batches, _MACS, taylor)
        training.seconds += seconds
        training.restart(training.epochs - half)
        for _ in range(training.epochs - half):
            training.run_epoch()
        return {"cut_epoch": half}

    return arm


def early(importance: str, **options: Any) -> Arm:
    def arm(training: Training) -> dict[str, Any]:
        pruner = training.timed(lambda: early_pruner(training, importance, **options))
        for _ in range(training.epochs):
            training.run_epoch(pruner.observe)
            training.timed(pruner.epoch_end)
        return {"cut_epoch": pruner.cut_epoch, "indicators": pruner.indicators[1:]}

    return arm


def early_pruner(training: Training, importance: str, **options: Any) -> EarlyPruner:
    settings = {"budget": Budget(macs=_MACS), "cap": training.epochs // 3, "round_to": ROUND_TO, **options}
    example = torch.zeros(2, 3, 32, 32)
    return EarlyPruner(training.model, training.optimizer, example, importance=importance, **settings)


ARMS: dict[str, Arm] = {
    "dense": dense,
    "random, at the start": at_start("random"),
    "uniform L1, at the start": at_start("magnitude"),
    "Taylor, at the start": at_start("taylor"),
    "train, Torch-Pruning L2, fine-tune": then_fine_tuned(taylor=False),
    "train, Torch-Pruning Taylor, fine-tune": then_fine_tuned(taylor=True),
    "EarlyPruner, taylor": early("taylor"),
    "EarlyPruner, magnitude": early("magnitude"),
    "EarlyPruner, taylor, in 10 steps": early("taylor", steps=10, every=_STEPS // 2),
}
MINE = "EarlyPruner, taylor"


def run(network: str, name: str, seed: int, epochs: int = _EPOCHS) -> dict[str, Any]:
    """One arm: accuracy, seconds, cost of a step of what it ends with."""
    training = Training(network, seed, epochs)
    example = torch.zeros(2, 3, 32, 32)
    whole = trace(training.model, example).macs()
    more = ARMS[name](training)
    batch = epoch_batches(seed, 1)[0]
    step = compare_steps([copy.deepcopy(training.model)], batch, loss)[0]
    return {
        "arm": name,
        "network": network,
        "seed": seed,
        "epochs": epochs,
        "accuracy": accuracy(training.model),
        "seconds": training.seconds,
        "step_ms": step.milliseconds,
        "peak_bytes": step.peak_bytes,
        "macs_reached": trace(training.model, example).macs() / whole,
        **more,
    }


def run_scan(network: str, importance: str, seed: int, at: list[int]) -> Scan:
    """Accuracy against the epoch of the cut."""

    def start() -> tuple:
        training = Training(network, seed)
        return training.model, training.optimizer, training.schedule

    def train_epoch(model: nn.Module, optimizer: Any, schedule: Any, epoch: int, observe: Callable) -> None:
        train(model, optimizer, schedule, epoch_batches(seed, epoch + 1), observe)

    options = {"budget": Budget(macs=_MACS), "importance": importance, "round_to": ROUND_TO, "cap": _EPOCHS // 3}
    return scan(start, train_epoch, accuracy, torch.zeros(2, 3, 32, 32), _EPOCHS, at=at, **options)


# --- the page ---------------------------------------------------------------------------------------------------------
def render(machine: dict[str, Any], found: list[dict[str, Any]], scans: dict[tuple[str, str, int], Scan]) -> str:
    """Markdown of all rows and scans; losses are printed like wins."""
    parts = [
        "# Early pruning",
        f"Fashion-MNIST from scratch in {_EPOCHS} epochs of {_STEPS} steps, batch {_BATCH}, at {_MACS:g} of the MACs. "
        "`python -m benchmarks.early` made the rows, `python -m benchmarks.early --table` this page.",
        f"Machine: {machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, torch "
        f"{machine['torch']}, several runs at a time: seconds are those that the one thread worked; bfloat16 autocast, "
        f"channels_last. Accuracy in percent on the first {_TEST_IMAGES:,} test images at the end, ± standard "
        "deviation over the seeds. Step: of the network at the end; time: of the whole training, pruning included.",
    ]
    for network in dict.fromkeys(row["network"] for row in found):
        arms = {arm: [r for r in found if r["network"] == network and r["arm"] == arm] for arm in ARMS}
        arms = {arm: runs for arm, runs in arms.items() if runs}
        parts += [f"## {network}", _table(arms), *_verdicts(arms)]
    for (network, importance, seed), made in scans.items():
        parts.append(f"## Where to cut: {network}, {importance}, seed {seed}")
        parts.append(f"![accuracy against the epoch of the cut]({_figure(network, importance, seed)})")
        arm = f"EarlyPruner, {importance}"
        same = [
            r
            for r in found
            if (r["network"], r["arm"], r["seed"], r.get("cut_epoch")) == (network, arm, seed, made.chosen)
        ]
        parts.append(_scan_verdict(made, same[0]["accuracy"] if same else None))
    return "\n\n".join(parts) + "\n"


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in runs)


def _table(arms: dict[str, list[dict[str, Any]]]) -> str:
    whole = _mean(arms["dense"], "seconds") if "dense" in arms else float("nan")
    header = ["", "accuracy", "time / dense", "seconds", "cut after epoch", "step ms", "step MiB", "MACs", "seeds"]
    lines = []
    for arm, runs in arms.items():
        values = [100 * row["accuracy"] for row in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cuts = ", ".join(str(row.get("cut_epoch", "-")) for row in runs)
        lines.append(
            [
                arm,
                f"{statistics.fmean(values):.1f} ± {spread:.1f}",
                f"{_mean(runs, 'seconds') / whole:.2f}",
                f"{_mean(runs, 'seconds'):.0f}",
                cuts,
                f"{_mean(runs, 'step_ms'):.0f}",
                f"{_mean(runs, 'peak_bytes') / 2**20:.0f}",
                f"{_mean(runs, 'macs_reached'):.3f}",
                len(runs),
            ]
        )
    return markdown_table(header, lines)


def _verdicts(arms: dict[str, list[dict[str, Any]]]) -> list[str]:
    if MINE not in arms or "dense" not in arms:
        return []
    mine, whole = arms[MINE], arms["dense"]
    best = {
        "train-prune-fine-tune": [a for a in arms if a.startswith("train,")],
        "pruning at the start": [a for a in arms if a.endswith("at the start")],
    }
    lines = []

    def line(met: bool, text: str) -> None:
        lines.append(f"- {'met' if met else '**missed**'}: {text}")

    share = _mean(mine, "seconds") / _mean(whole, "seconds")
    line(share <= 0.5, f"{MINE} takes {share:.2f} of dense's time (bar: 0.5)")
    loss_of = 100 * (_mean(whole, "accuracy") - _mean(mine, "accuracy"))
    line(loss_of <= 1, f"it ends {loss_of:.1f} points below dense (bar: 1)")
    for what, names in best.items():
        if names:
            top = max(names, key=lambda name: _mean(arms[name], "accuracy"))
            lead = 100 * (_mean(mine, "accuracy") - _mean(arms[top], "accuracy"))
            line(lead >= 0, f"it is {lead:+.1f} points from the best of {what}, {top}")
    return ["\n".join(lines)]


def _scan_verdict(made: Scan, chosen: float | None) -> str:
    """`chosen`: accuracy of the arm that cut at the chosen epoch; it is the same training."""
    best = f"The best cut is after epoch {made.best}, with {made.accuracy(made.best):.1%}"
    if made.chosen in made.epochs:
        chosen = made.accuracy(made.chosen)
    if chosen is None:
        return f"{best}; the indicator chose {made.chosen}, which was not scanned."
    lost = 100 * (made.accuracy(made.best) - chosen)
    verdict = "met" if lost <= 0.5 else "**missed**"
    return (
        f"{best}; the indicator chose epoch {made.chosen}, {lost:.1f} points below.\n\n"
        f"- {verdict}: within 0.5 points of the best"
    )


def _figure(network: str, importance: str, seed: int) -> str:
    return f"early_{network}_{importance}_{seed}.png"


def _kept_scans(folder: Path) -> dict[tuple[str, str, int], Scan]:
    found = {}
    for path in sorted(folder.glob("early_scan-*.json")):
        _, network, importance, seed = path.stem.split("-")
        found[network, importance, int(seed)] = Scan.from_json(path.read_text())
    return found


@click.command()
@click.option("--network", "networks", multiple=True, default=tuple(NETWORKS), type=click.Choice(list(NETWORKS)))
@click.option("--arm", "arms", multiple=True, default=tuple(ARMS), type=click.Choice(list(ARMS)))
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default=_EPOCHS, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--scan", "scans", is_flag=True, help="The scan in the arms' place.")
@click.option(
    "--at", multiple=True, type=int, default=(1, 3, 6, 9, 12, 16, 20, 30, 40), help="Epochs of the scan's cuts."
)
@click.option("--importance", default="taylor", show_default=True, help="Of the scan.")
@click.option("--table", is_flag=True, help="Only write the page.")
@click.option("--results", type=click.Path(path_type=Path), default=_OUT / "early.jsonl")
@click.option("--docs", type=click.Path(path_type=Path), default=_DOCS)
def main(
    networks: tuple,
    arms: tuple,
    seeds: int,
    epochs: int,
    threads: int,
    scans: bool,
    at: tuple,
    importance: str,
    table: bool,
    results: Path,
    docs: Path,
) -> None:
    """Run what the results do not hold yet, or write the page."""
    torch.set_num_threads(threads)
    if table:
        machine = json.loads(results.read_text().partition("\n")[0])["machine"]
        made = _kept_scans(results.parent)
        for (network, kind, seed), one in made.items():
            one.plot(docs / _figure(network, kind, seed), f"{network}, {kind}, seed {seed}")
        found = [row for row in rows(results) if row["epochs"] == _EPOCHS]
        (docs / "early.md").write_text(render(machine, found, made))
        return
    if scans:
        if epochs != _EPOCHS:
            raise click.UsageError(f"--scan: is of {_EPOCHS} epochs")
        for network in networks:
            for seed in range(seeds):
                path = results.parent / f"early_scan-{network}-{importance}-{seed}.json"
                if not path.exists():
                    path.write_text(run_scan(network, importance, seed, list(at)).to_json())
        return
    if not results.exists():
        results.write_text(json.dumps({"machine": machine_info(threads)}) + "\n")
    done = {(r["network"], r["arm"], r["seed"], r["epochs"]) for r in rows(results)}
    for seed in range(seeds):
        for network in networks:
            for name in arms:
                if (network, name, seed, epochs) in done:
                    continue
                row = run(network, name, seed, epochs)
                with results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                click.echo(f"{network} seed {seed} {name}: {row['accuracy']:.1%} in {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
