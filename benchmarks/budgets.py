"""Budgets in time and memory: what was promised beside what is measured, and accuracy at an equal train step.

    python -m benchmarks.budgets                                    # all of it: an hour
    python -m benchmarks.budgets --network resnet18 --dtype bfloat16 --no-accuracy
    python -m benchmarks.budgets --table                            # docs/budget_promises.md of what there is

Rows are appended to a JSON-lines file as they come; what it holds already is not run again. Keep the machine idle
meanwhile: promises are wall time.
"""

from __future__ import annotations

import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import nn

import stamp_fast
from stamp_fast import Budget
from stamp_fast.data import cross_entropy
from stamp_fast.report import compare_forwards, compare_steps

from . import data
from .machine import machine_info
from .networks import cifar_resnet18, cifar_vgg
from .table import markdown_table
from .time_to_accuracy import Task, loss, rows, run, timed_prune, torch_pruned

_OUT = Path(__file__).parent / "results" / "budgets.jsonl"
_DOCS = Path(__file__).parent.parent / "docs"
ASKS = {"train_step": 0.5, "latency": 0.5, "memory": 0.6}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_WITHIN = 0.1
_SECONDS = 12.0  # of the measurement that promises are held to
_STEPS, _LR = 200, 0.05
_TARGET = "fashion"
_EQUAL = 0.03  # train steps that differ by less are equal


def _torchvision(name: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, num_classes=10)

    return make


# Network, pixels, batch.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "ResNet-18": (cifar_resnet18, 32, 32),
    "VGG-16-BN": (cifar_vgg, 32, 32),
    "ResNet-50": (_torchvision("resnet50"), 112, 8),
    "MobileNetV2": (_torchvision("mobilenet_v2"), 112, 16),
    "DenseNet-121": (_torchvision("densenet121"), 112, 8),
}


def promise(network: str, dtype: str, unit: str) -> dict[str, Any]:
    """One prune, and the cost of what is left, measured by itself and at length."""
    make, pixels, batch = NETWORKS[network]
    torch.manual_seed(0)
    model = make().to(DTYPES[dtype], memory_format=torch.channels_last)
    images = torch.randn(batch, 3, pixels, pixels).to(DTYPES[dtype], memory_format=torch.channels_last)
    loader = [(images, torch.randint(0, 10, (batch,)))] * 2
    dense = copy.deepcopy(model)
    begin = time.perf_counter()
    budget = Budget(**{unit: ASKS[unit]})
    stamp_fast.prune(model, loader, budget=budget, method="taylor", seed=0, verify=False, progress=False)
    seconds = time.perf_counter() - begin
    report = stamp_fast.report(model)
    both = [dense, copy.deepcopy(model)]
    before, after = compare_steps(both, loader[0], cross_entropy, seconds=_SECONDS)
    forwards = compare_forwards(both, images, seconds=_SECONDS / 3)
    found = {
        "train_step": after.milliseconds / before.milliseconds,
        "latency": forwards[1] / forwards[0],
        "memory": after.peak_bytes / before.peak_bytes,
    }
    return {
        "kind": "promise",
        "network": network,
        "dtype": dtype,
        "unit": unit,
        "asked": ASKS[unit],
        "measured": found[unit],
        "report_said": report.promises[0].pruned / report.promises[0].dense,
        "train_step": found["train_step"],
        "macs": report.macs_after / report.macs_before,
        "params": report.params_after / report.params_before,
        "dense_step_ms": before.milliseconds,
        "seconds": seconds,
        "costs_seconds": report.seconds["costs"],
    }


# --- accuracy at an equal train step ----------------------------------------------------------------------------------
def _step_ratio(task: Task, model: nn.Module) -> float:
    """Measured, in turns with the dense network's."""
    models = [task.dense().to(memory_format=torch.channels_last), copy.deepcopy(model)]
    models[1].to(memory_format=torch.channels_last)
    before, after = compare_steps(models, task.batches(1)[0], loss, seconds=4.0)
    return after.milliseconds / before.milliseconds


def _by_time(task: Task, batches: list, ask: float) -> nn.Module:
    model = task.dense()
    options = {"method": "taylor", "loss_fn": loss, "seed": task.seed, "progress": False}
    return stamp_fast.prune(model, batches, budget=Budget(train_step=ask), **options)


def _by_macs(round_to: int | None) -> Callable[[Task, list, float], nn.Module]:
    def arm(task: Task, batches: list, ask: float) -> nn.Module:
        def pruned(share: float) -> nn.Module:
            options = {"method": "taylor", "loss_fn": loss, "seed": task.seed, "progress": False}
            return timed_prune(task.dense(), batches, budget=Budget(macs=share), round_to=round_to, **options)[0]

        return _bisected(task, pruned, ask)

    return arm


def _by_torch_pruning(task: Task, batches: list, ask: float) -> nn.Module:
    return _bisected(task, lambda share: torch_pruned(task.dense(), batches, share, taylor=True)[0], ask)


def _bisected(task: Task, pruned: Callable[[float], nn.Module], ask: float) -> nn.Module:
    """The network whose measured train step is that of the ask, over shares of the MACs."""
    low, high, best, closest = 0.02, 1.0, None, float("inf")
    for _ in range(7):
        share = (low * high) ** 0.5
        model = pruned(share)
        ratio = _step_ratio(task, model)
        if abs(ratio / ask - 1) < closest:
            best, closest = model, abs(ratio / ask - 1)
        if closest < _EQUAL:
            break
        low, high = (share, high) if ratio < ask else (low, share)
    return best


ARMS: dict[str, Callable[[Task, list, float], nn.Module]] = {
    "Budget(train_step)": _by_time,
    "Budget(macs)": _by_macs(None),
    "Budget(macs), round_to=8": _by_macs(8),
    "Torch-Pruning, round_to=8": _by_torch_pruning,
}


def equal_time(name: str, network: str, ask: float, seed: int) -> dict[str, Any]:
    """Fine-tuned for the same steps; all arms are chosen by Taylor scores."""
    task = Task(network, _TARGET, ask, seed, _STEPS, _LR)
    kept: list[nn.Module] = []

    def arm(task: Task, batches: list) -> tuple[nn.Module, float]:
        begin = time.process_time()
        kept.append(copy.deepcopy(model := ARMS[name](task, batches, ask)))
        return model, time.process_time() - begin

    row = run(name, task, arm)
    step = _step_ratio(task, kept[0])
    accuracy = row["curve"][-1][2]
    return {"kind": "accuracy", "arm": name, "network": network, "ask": ask, "seed": seed, "accuracy": accuracy} | {
        "train_step": step,
        "macs": row["macs_reached"],
    }


# --- the page ---------------------------------------------------------------------------------------------------------
def render(machine: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Markdown of all rows; what was missed is printed like what was kept."""
    lines = [
        "# Budgets in time and memory",
        "Asked of `prune(model, loader, method='taylor')`, and measured afterwards by itself, dense and pruned in "
        "turns. Fractions of the dense network; MACs beside them, which are no measure of time. "
        "`python -m benchmarks.budgets` made the rows.",
        f"Machine: {machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, torch "
        f"{machine['torch']}; channels_last.",
    ]
    promises = [row for row in found if row["kind"] == "promise"]
    if promises:
        header = ["network", "dtype", "asked", "measured", "off by", "kept", "MACs", "params", "train step", "prune, s"]
        table = []
        for row in promises:
            off = row["measured"] / row["asked"] - 1
            cells = [f"{row['unit']}={row['asked']:g}", f"{row['measured']:.3f}", f"{off:+.0%}"]
            cells += ["yes" if abs(off) <= _WITHIN else "**no**", f"{row['macs']:.3f}", f"{row['params']:.3f}"]
            cells += [f"{1 / row['train_step']:.2f}x faster" if row["train_step"] < 1 else "not faster"]
            table.append([row["network"], row["dtype"], *cells, f"{row['seconds']:.0f}"])
        kept = sum(abs(row["measured"] / row["asked"] - 1) <= _WITHIN for row in promises)
        lines += ["## Promised and measured", f"Within 10 percent: {kept} of {len(promises)}."]
        lines.append(markdown_table(header, table))
    for network in dict.fromkeys(row["network"] for row in found if row["kind"] == "accuracy"):
        mine = [row for row in found if row["kind"] == "accuracy" and row["network"] == network]
        ask = mine[0]["ask"]
        lines += [f"## {network}, at {ask:g} of the train step", _accuracies(mine), *_verdicts(mine)]
    return "\n\n".join(lines) + "\n"


def _arms(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: runs for name in ARMS if (runs := [row for row in found if row["arm"] == name])}


def _accuracies(found: list[dict[str, Any]]) -> str:
    header = ["", f"accuracy after {_STEPS} steps", "train step", "MACs", "seeds"]
    table = []
    for name, runs in _arms(found).items():
        values = [100 * row["accuracy"] for row in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = [f"{statistics.fmean(row[key] for row in runs):.3f}" for key in ("train_step", "macs")]
        table.append([name, f"{statistics.fmean(values):.2f} ± {spread:.2f}", *cells, len(runs)])
    return markdown_table(header, table)


def _verdicts(found: list[dict[str, Any]]) -> list[str]:
    arms = _arms(found)
    means = {name: 100 * statistics.fmean(row["accuracy"] for row in runs) for name, runs in arms.items()}
    ours = "Budget(train_step)"
    if ours not in means:
        return []
    lines = [
        f"- {'met' if means[ours] >= mean else '**missed**'}: {means[ours] - mean:+.2f} points from {name}"
        for name, mean in means.items()
        if name != ours
    ]
    return ["\n".join(lines)]


@click.command()
@click.option("--network", "networks", multiple=True, default=tuple(NETWORKS), type=click.Choice(list(NETWORKS)))
@click.option("--dtype", "dtypes", multiple=True, default=tuple(DTYPES), type=click.Choice(list(DTYPES)))
@click.option("--unit", "units", multiple=True, default=tuple(ASKS), type=click.Choice(list(ASKS)))
@click.option("--promises/--no-promises", default=True)
@click.option("--accuracy/--no-accuracy", default=True)
@click.option("--trained", "trained", multiple=True, default=("resnet18", "vgg"), help="Networks of the accuracies.")
@click.option("--ask", default=0.4, show_default=True, help="Train step of the accuracies.")
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--table", is_flag=True, help="Only write the page.")
@click.option("--results", type=click.Path(path_type=Path), default=_OUT)
@click.option("--docs", type=click.Path(path_type=Path), default=_DOCS)
def main(
    networks: tuple,
    dtypes: tuple,
    units: tuple,
    promises: bool,
    accuracy: bool,
    trained: tuple,
    ask: float,
    seeds: int,
    threads: int,
    table: bool,
    results: Path,
    docs: Path,
) -> None:
    """Run what the results do not hold yet, or write the page."""
    if table:
        machine = json.loads(results.read_text().partition("\n")[0])["machine"]
        (docs / "budget_promises.md").write_text(render(machine, list(rows(results))))
        return
    torch.set_num_threads(threads)
    if not results.exists():
        results.write_text(json.dumps({"machine": machine_info(threads)}) + "\n")
    done = list(rows(results))
    # Costs that another run has measured would make a prune look quicker than it is.
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict("os.environ", STAMP_FAST_CACHE=cache):
        if promises:
            known = {(r["network"], r["dtype"], r["unit"]) for r in done if r["kind"] == "promise"}
            for key in ((n, d, u) for n in networks for d in dtypes for u in units):
                if key not in known:
                    _append(results, promise(*key))
        if accuracy:
            data.target(_TARGET)
            known = {(r["arm"], r["network"], r["ask"], r["seed"]) for r in done if r["kind"] == "accuracy"}
            for key in ((a, n, ask, s) for n in trained for s in range(seeds) for a in ARMS):
                if key not in known:
                    _append(results, equal_time(*key))


def _append(results: Path, row: dict[str, Any]) -> None:
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    click.echo(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
