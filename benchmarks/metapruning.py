"""MetaPruning on Fashion-MNIST: searched widths against uniform, random and ranked ones, retrained alike.

    python -m benchmarks.metapruning                                       # all of it: hours
    torchrun --nproc-per-node 2 -m benchmarks.metapruning --network mobilenet_v2 --threads 1
    python -m benchmarks.metapruning --latencies                           # of all arms, in turns; nothing else running
    python -m benchmarks.metapruning --table                               # docs/metapruning.md of what there is

Rows are appended to a JSON-lines file as they come; what it holds already is not run again. Under torchrun the
processes share every search, and take turns at the retrainings. PruningNet and search see the training images only, of
which 5,000 are held out for the scores; accuracies are of test images.
"""

from __future__ import annotations

import bisect
import functools
import json
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch
from scipy.stats import spearmanr
from torch import distributed, nn
from torch.utils.data import TensorDataset

from stamp_fast import Budget, importance
from stamp_fast.cost_table import CostTable
from stamp_fast.metapruning import Genome, PruningNet, search

from . import data
from .machine import machine_info
from .networks import cifar_mobilenet_v2, cifar_resnet18
from .table import markdown_table
from .time_to_accuracy import hit_rate, loss, now, rows

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "mobilenet_v2": lambda: cifar_mobilenet_v2(16),
    "resnet18": lambda: cifar_resnet18((12, 24, 48, 96)),
}
BUDGETS = {"macs": Budget(macs=0.15), "latency": Budget(latency=0.45)}
_AT_LEAST = 0.95  # of the budget, as for the paper's ResNet-50: all arms are of one size
_BATCH = 64
_EPOCHS, _STEPS = 45, 100  # of the PruningNet
_RETRAINING, _LR = 600, 0.1
_EVALUATIONS = 1000
_SCORED = 3000  # held-out images; of 1,000 the best score of many genomes is luck (2 points above that of 5,000)
_MOST_SECONDS = 600  # for the evaluations, on two cores
_GENOMES = 20  # of which scores are held to accuracies
_TEST_IMAGES = 10000
_OUT = Path(__file__).parent / "results"
_CACHE = Path(__file__).parent / ".cache"
_DOCS = Path(__file__).parent.parent / "docs"


def parts() -> tuple[TensorDataset, TensorDataset]:
    """Training images, and those held out of them."""
    images, labels = data.target("fashion")[0].tensors
    return TensorDataset(images[5000:], labels[5000:]), TensorDataset(images[:5000], labels[:5000])


class Epochs:
    """Random batches, others in every pass; of several processes each has a part of every batch."""

    def __init__(self, steps: int, seed: int) -> None:
        self.steps, self.seed, self.passes = steps, seed, 0

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator:
        self.passes += 1
        seed = 1000 * self.seed + self.passes + 100_000 * rank()
        return iter(_channels_last(data.batches(parts()[0], _BATCH // ranks(), self.steps, seed)))


def _channels_last(batches: list) -> list:
    """On CPUs a depthwise convolution takes a quarter of the time then."""
    return [(inputs.contiguous(memory_format=torch.channels_last), labels) for inputs, labels in batches]


def pruning_net(network: str) -> PruningNet:
    """Trained, from the cache if it is there."""
    torch.manual_seed(0)
    net = PruningNet(NETWORKS[network](), torch.zeros(2, 3, 32, 32))
    path = _CACHE / f"metapruning_{network}_{_EPOCHS}.safetensors"
    path.parent.mkdir(exist_ok=True)
    return net.fit(Epochs(_STEPS, 1), epochs=_EPOCHS, loss_fn=loss, checkpoint=path, progress=not rank())


@functools.cache
def images() -> tuple[list, list]:
    """What batch norms are calibrated on, and what genomes are scored on."""
    train, held = parts()
    scored = [(x, y) for x, y in zip(*(t[:_SCORED].split(250) for t in held.tensors), strict=True)]
    return _channels_last(data.batches(train, 128, 4, 7)), _channels_last(scored)


def retrain(model: nn.Module, seed: int) -> tuple[float, float]:
    """Test accuracy, and seconds, of the recipe that all share."""
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), _LR, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, _RETRAINING, pct_start=0.1, cycle_momentum=False)
    begin = now()
    for batch in _channels_last(data.batches(data.target("fashion")[0], _BATCH, _RETRAINING, 5000 + seed)):
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    seconds = now() - begin
    return hit_rate(model, data.target("fashion")[1], _TEST_IMAGES), seconds


# --- arms: each chooses what stays of every group ---------------------------------------------------------------------
Arm = Callable[[PruningNet, Budget, str], torch.Tensor]


def uniform(net: PruningNet, budget: Budget, network: str) -> torch.Tensor:
    """The same share of every group, any share: those of the genes lie too far apart for networks of equal size."""
    graph = net.space.graph

    def at(share: int) -> torch.Tensor:
        return _first_channels(graph, [max(1, round(share / 1000 * group.num_classes)) for group in graph.prunable])

    return at(bisect.bisect_right(range(1, 1001), 1.0, key=lambda share: budget.used(graph, at(share))))


def searched(net: PruningNet, budget: Budget, network: str, **options: Any) -> torch.Tensor:
    name = f"metapruning_{network}_{_EPOCHS}.jsonl"  # one file for all: scores do not depend on budgets
    options |= {"at_least": _AT_LEAST, "checkpoint": _CACHE / name, "progress": not rank()}
    return search(net, *images(), budget=budget, **options).keep


def ranked(method: str) -> Arm:
    """Widths that a global ranking leaves of the dense network, trained by the recipe."""

    def arm(net: PruningNet, budget: Budget, network: str) -> torch.Tensor:
        graph = net.space.graph
        trained = _dense(network)
        graph.model.load_state_dict(trained.state_dict())
        if method == "taylor":
            scores = importance.taylor(graph, data.batches(parts()[0], _BATCH, 8, 3), loss)
        else:
            scores = importance.magnitude(graph, p=1)
        for macs in (share / 100 for share in range(99, 0, -1)):
            keep = graph.select(scores, Budget(macs=macs), ranking="global", floor=0.1, exact=False)
            if budget.used(graph, keep) <= 1:
                return _first_channels(graph, [int(keep[group.classes].sum()) for group in graph.prunable])
        raise AssertionError("no share of the MACs is within the budget")

    return arm


@functools.cache
def _dense(network: str) -> nn.Module:
    path = _CACHE / f"metapruning_dense_{network}.pt"
    torch.manual_seed(0)
    model = NETWORKS[network]()
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        retrain(model, 0)
        if not rank():
            torch.save(model.state_dict(), path)
    return model.to(memory_format=torch.contiguous_format)


ARMS: dict[str, Arm] = {
    "uniform": uniform,
    "L1, ranked globally": ranked("l1"),
    "Taylor, ranked globally": ranked("taylor"),
    "random, best score of 1,000": functools.partial(searched, population=_EVALUATIONS, generations=1, seed=100),
    "MetaPruning": searched,
}
SEARCHED = ("random, best score of 1,000", "MetaPruning")


def rank() -> int:
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks() -> int:
    return distributed.get_world_size() if distributed.is_initialized() else 1


def agreed(keep: torch.Tensor) -> torch.Tensor:
    """The first process's: measured times, and with them what fits, differ."""
    if ranks() > 1:
        distributed.broadcast(keep, 0)
    return keep


def compare(network: str, seeds: int, names: tuple[str, ...], units: tuple[str, ...], results: Path) -> None:
    """Every arm at every budget."""
    net = pruning_net(network)
    graph = net.space.graph
    graph.cost_table = table = CostTable(graph, images()[1][0][0][:_BATCH], path=_CACHE / f"costs_{network}.jsonl")
    done = {(r["network"], r["unit"], r["arm"], r["seed"]) for r in rows(results) if r["kind"] == "arm"}
    for unit in units:
        for name in names:
            missing = [seed for seed in range(seeds) if (network, unit, name, seed) not in done]
            if not missing:
                continue
            begin = time.perf_counter()
            keep = agreed(ARMS[name](net, BUDGETS[unit], network))
            chosen_in = time.perf_counter() - begin
            predicted = table.latency(keep)
            measured, whole = table.measured(keep, graph.all_kept(), rounds=25)
            for seed in missing[rank() :: ranks()]:
                torch.manual_seed(1000 + seed)
                accuracy, seconds = retrain(net.space.fresh(keep), seed)
                append(
                    results,
                    kind="arm",
                    network=network,
                    unit=unit,
                    arm=name,
                    seed=seed,
                    accuracy=accuracy,
                    seconds=seconds,
                    chosen_in=chosen_in,
                    processes=ranks(),
                    macs=graph.macs(keep) / graph.macs(),
                    latency=measured / whole,
                    predicted_ms=predicted,
                    measured_ms=measured,
                    widths=[int(keep[group.classes].sum()) for group in graph.prunable],
                )


def measure_latencies(network: str, results: Path) -> None:
    """Of all arms there are, in turns with the widest network: what the page says, instead of what each search saw."""
    space = PruningNet(NETWORKS[network](), torch.zeros(2, 3, 32, 32)).space
    graph = space.graph
    table = CostTable(graph, images()[1][0][0][:_BATCH], path=_CACHE / f"costs_{network}.jsonl")
    widths = {
        (r["unit"], r["arm"]): r["widths"] for r in rows(results) if r["kind"] == "arm" and r["network"] == network
    }
    for unit in dict.fromkeys(unit for unit, _ in widths):
        names = [arm for which, arm in widths if which == unit]
        keeps = [_first_channels(graph, widths[unit, arm]) for arm in names]
        whole, *measured = table.measured(graph.all_kept(), *keeps, rounds=51)
        for arm, keep, milliseconds in zip(names, keeps, measured, strict=True):
            found = {"network": network, "unit": unit, "arm": arm, "latency": milliseconds / whole}
            # Budgets are fractions; and the table is of the hour in which the search ran.
            found["predicted_ms"] = table.latency(keep) / table.latency(graph.all_kept()) * whole
            append(results, kind="latency", measured_ms=milliseconds, **found)


def _first_channels(graph: Any, widths: list[int]) -> torch.Tensor:
    keep = graph.all_kept()
    for group, width in zip(graph.prunable, widths, strict=True):
        keep[group.classes.start + width : group.classes.stop] = False
    return keep


def correlate(network: str, results: Path) -> None:
    """Scores of random genomes and what they reach when they are retrained."""
    net = pruning_net(network)
    done = {tuple(r["ids"]) for r in rows(results) if r["kind"] == "genome" and r["network"] == network}
    draw = random.Random(11)
    genomes: list[Genome] = [net.space.random(draw) for _ in range(_GENOMES)]
    for genome in [g for g in genomes if g.ids not in done][rank() :: ranks()]:
        torch.manual_seed(1000)
        accuracy, _ = retrain(genome.build(), 0)
        score = net.score(genome, *images())
        macs = genome.macs() / net.space.largest.macs()
        append(results, kind="genome", network=network, ids=genome.ids, score=score, accuracy=accuracy, macs=macs)


def append(results: Path, **row: Any) -> None:
    with results.open("a") as file:
        file.write(json.dumps(row) + "\n")
    click.echo(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()))


# --- the page ---------------------------------------------------------------------------------------------------------
def render(machine: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """Markdown of all rows; losses are printed like wins."""
    lines = [
        "# MetaPruning",
        f"Fashion-MNIST. PruningNet: {_EPOCHS * _STEPS:,} steps of batch {_BATCH}; search: {_EVALUATIONS:,} genomes, "
        f"each scored on {_SCORED:,} held-out images after its batch norms saw 512 others; all arms retrained from "
        f"scratch for {_RETRAINING} steps. `python -m benchmarks.metapruning` made the rows.",
        f"Machine: {machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores for "
        f"each process, torch {machine['torch']}. Accuracy in percent on {_TEST_IMAGES:,} test images, ± standard "
        "deviation over the seeds. Latency: of a forward, all arms measured in turns afterwards, as a fraction of the "
        "widest network's, beside the fraction that the table predicts over that.",
    ]
    for network in dict.fromkeys(row["network"] for row in found):
        mine = [row for row in found if row["network"] == network]
        lines.append(f"## {network}")
        genomes = [row for row in mine if row["kind"] == "genome"]
        if len(genomes) > 2:
            accuracies, scores, macs = ([row[key] for row in genomes] for key in ("accuracy", "score", "macs"))
            found_rank, size_rank = (spearmanr(values, accuracies).statistic for values in (scores, macs))
            verdict = "met" if found_rank >= 0.5 else "**missed**"
            lines.append(
                f"Scores of {len(genomes)} random genomes against their accuracies when retrained: Spearman "
                f"{found_rank:.2f} (bar 0.5: {verdict}); their MACs alone: {size_rank:.2f}."
            )
        for unit in BUDGETS:
            arms = {
                name: [r for r in mine if r["kind"] == "arm" and (r["unit"], r["arm"]) == (unit, name)] for name in ARMS
            }
            again = {r["arm"]: r for r in mine if r["kind"] == "latency" and r["unit"] == unit}
            arms = {name: [row | _latency(again.get(name, {})) for row in runs] for name, runs in arms.items() if runs}
            if arms:
                ask = BUDGETS[unit].asked()[unit]
                lines += [f"### At {ask:g} of the {unit}", _table(arms), *_verdicts(arms, unit)]
    return "\n\n".join(lines) + "\n"


def _latency(row: dict[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("latency", "measured_ms", "predicted_ms") if key in row}


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.fmean(row[key] for row in runs)


def _table(arms: dict[str, list[dict[str, Any]]]) -> str:
    header = ["", "accuracy", "MACs", "latency", "predicted / measured", "chosen in, s", "seeds"]
    lines = []
    for name, runs in arms.items():
        values = [100 * row["accuracy"] for row in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells = [f"{statistics.fmean(values):.2f} ± {spread:.2f}", f"{_mean(runs, 'macs'):.3f}"]
        cells += [f"{_mean(runs, 'latency'):.2f}", f"{_mean(runs, 'predicted_ms') / _mean(runs, 'measured_ms'):.2f}"]
        lines.append([name, *cells, f"{_mean(runs, 'chosen_in'):.0f}", len(runs)])
    return markdown_table(header, lines)


def _verdicts(arms: dict[str, list[dict[str, Any]]], unit: str) -> list[str]:
    if "MetaPruning" not in arms:
        return []
    mine, lines = arms["MetaPruning"], []
    for name, runs in arms.items():
        if name != "MetaPruning":
            lead = 100 * (_mean(mine, "accuracy") - _mean(runs, "accuracy"))
            lines.append(f"- {'met' if lead > 0 else '**missed**'}: MetaPruning is {lead:+.2f} points from {name}")
    off = _mean(mine, "predicted_ms") / _mean(mine, "measured_ms") - 1
    lines.append(f"- {'met' if abs(off) <= 0.1 else '**missed**'}: its latency is predicted {off:+.0%} off (bar: 10%)")
    for name, runs in arms.items():
        if name in SEARCHED:
            seconds, processes = runs[0]["chosen_in"], runs[0]["processes"]
            verdict = f": {'met' if seconds <= _MOST_SECONDS else '**missed**'}" if processes == 2 else ""
            where = "1 process" if processes == 1 else f"{processes} processes"
            lines.append(
                f"- {name}: {_EVALUATIONS:,} evaluations took {seconds:.0f} s in {where} of one thread "
                f"(bar: {_MOST_SECONDS} s in two{verdict})"
            )
    return ["\n".join(lines)]


@click.command()
@click.option("--network", "networks", multiple=True, default=tuple(NETWORKS), type=click.Choice(list(NETWORKS)))
@click.option("--arm", "arms", multiple=True, default=tuple(ARMS), type=click.Choice(list(ARMS)))
@click.option("--unit", "units", multiple=True, default=tuple(BUDGETS), type=click.Choice(list(BUDGETS)))
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--correlation/--no-correlation", default=True, help="Scores against accuracies.")
@click.option("--latencies", is_flag=True, help="Only measure the latencies of all arms again.")
@click.option("--table", is_flag=True, help="Only write the page.")
@click.option("--results", type=click.Path(path_type=Path), default=_OUT / "metapruning.jsonl")
@click.option("--docs", type=click.Path(path_type=Path), default=_DOCS)
def main(
    networks: tuple,
    arms: tuple,
    units: tuple,
    seeds: int,
    threads: int,
    correlation: bool,
    latencies: bool,
    table: bool,
    results: Path,
    docs: Path,
) -> None:
    """Run what the results do not hold yet, or write the page."""
    torch.set_num_threads(threads)
    if table:
        machine = json.loads(results.read_text().partition("\n")[0])["machine"]
        (docs / "metapruning.md").write_text(render(machine, list(rows(results))))
        return
    if latencies:
        for network in networks:
            measure_latencies(network, results)
        return
    if "RANK" in os.environ:
        distributed.init_process_group("gloo")
    if not rank() and not results.exists():
        results.write_text(json.dumps({"machine": machine_info(threads)}) + "\n")
    if ranks() > 1:
        distributed.barrier()
    for network in networks:
        compare(network, seeds, arms, units, results)
        if correlation:
            correlate(network, results)
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
