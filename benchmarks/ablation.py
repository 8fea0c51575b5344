"""What STAMP's parts are worth: one is changed at a time, everything else stays.

    python -m benchmarks.ablation --network vgg        # rows into results/ablation.jsonl, docs/ablation.md

The place is the hardest of `benchmarks.time_to_accuracy`: an eighth of the MACs, and 100 steps in all.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
from torch import nn

import stamp_fast
from stamp_fast import Budget, importance, trace
from stamp_fast.recalibrate import recalibrate
from stamp_fast.reconstruct import reconstruct
from stamp_fast.stamp import MaskGenerator, Settings
from stamp_fast.stamp.head import fit_head

from . import data
from .machine import machine_info
from .reference import generator_for, pretrained_for
from .table import markdown_table
from .time_to_accuracy import ROUND_TO, Arm, Task, loss, pruned_by, rows, run, timed

_MACS = 0.125
_STEPS = 100
_RESULTS = Path(__file__).parent / "results" / "ablation.jsonl"


def _uniform(head: bool = False, folds: bool = False) -> Arm:
    """Uniform L1, with the parts of STAMP that need no gates."""

    def arm(task: Task, batches: list) -> tuple[nn.Module, float]:
        dense = task.dense()
        return timed(lambda: pruned(dense, batches))

    def pruned(model: nn.Module, batches: list) -> nn.Module:
        graph = trace(model, batches[0][0][:2])
        graph.settle()
        if head:
            model.train()
            fit_head(graph, batches, loss)
        keep = graph.select(importance.magnitude(graph), Budget(macs=_MACS), ranking="local", round_to=ROUND_TO)
        if folds:
            reconstruct(graph, keep, [inputs for inputs, _ in batches[:4]])
        graph.compact(keep)
        recalibrate(model, batches, loss)
        return model

    return arm


def _stamp(tasks: int | None = None, mode: str = "joint", set_images: int = 256, **options: Any) -> Arm:
    """STAMP with a generator that was meta-trained for so many tasks (0: untrained, None: as in the experiment)."""
    encoder = {"encoder": options.pop("encoder")} if "encoder" in options else {}

    def arm(task: Task, batches: list) -> tuple[nn.Module, float]:
        generator = _untrained(task, mode) if tasks == 0 else generator_for(task.network, mode, tasks, **encoder)
        with mock.patch.object(sys.modules["stamp_fast.prune"], "_SAMPLE", set_images):
            return pruned_by("stamp", lambda _: generator, **options)(task, batches)

    return arm


def _with_as_many_gate_steps() -> Arm:
    def arm(task: Task, batches: list) -> tuple[nn.Module, float]:
        with mock.patch.object(Settings, "split", lambda _, steps: (steps, steps)):
            return _stamp()(task, batches)

    return arm


def _untrained(task: Task, mode: str = "joint") -> MaskGenerator:
    graph = trace(task.dense(), torch.zeros(2, 3, 32, 32))
    graph.settle()
    return MaskGenerator.untrained(graph, mode=mode)


VARIANTS: dict[str, Callable[[], Arm]] = {
    "uniform L1": lambda: _uniform(),
    "uniform L1, head fitted": lambda: _uniform(head=True),
    "uniform L1, folded": lambda: _uniform(folds=True),
    "uniform L1, head fitted, folded": lambda: _uniform(head=True, folds=True),
    "STAMP, joint": lambda: _stamp(),
    "STAMP, structure": lambda: _stamp(mode="structure"),
    "not folded": lambda: _stamp(reconstruction=False),
    "unconditional gates (no generator)": lambda: pruned_by("stamp"),
    "meta-trained for 0 tasks": lambda: _stamp(tasks=0),
    "meta-trained for 50 tasks": lambda: _stamp(tasks=50),
    "encoder: mean": lambda: _stamp(tasks=50, encoder="mean"),
    "encoder: input": lambda: _stamp(tasks=50, encoder="input"),
    "16 images to look at and to fold on": lambda: _stamp(set_images=16),
    "64 images to look at and to fold on": lambda: _stamp(set_images=64),
    "20 steps of the gates, not 5": _with_as_many_gate_steps,
    "0 steps": lambda: _stamp(steps=0),
    "5 steps": lambda: _stamp(steps=5),
    "50 steps": lambda: _stamp(steps=50),
    "Taylor, 8 batches": lambda: pruned_by("taylor"),
}


def _masks(network: str, steps: int, seed: int) -> dict[str, torch.Tensor]:
    """What STAMP keeps for each data set, with the generator that is meta-trained for structure."""
    generator = generator_for(network, "structure")
    sets = {name: data.target(name)[0] for name in data.SHIPPED} | {"glyphs": data.reference()}
    masks = {}
    for name, dataset in sets.items():
        for half in ("a", "b"):  # other images of the same data set
            batches = data.batches(dataset, 64, 20, seed + (half == "b") * 1000)
            classes = int(dataset.tensors[1].max()) + 1
            model = pretrained_for(network, classes, seed)
            options = {"budget": Budget(macs=_MACS), "loss_fn": loss, "seed": seed, "progress": False}
            options |= {"round_to": ROUND_TO, "steps": steps}
            stamp_fast.prune(model, batches, generator=generator, **options)
            plan = stamp_fast.plan_of(model)
            masks[f"{name} {half}"] = _kept(plan)
    return masks


def _kept(plan: Any) -> torch.Tensor:
    """The positions that stay, of all parameters, as one row of numbers that name them."""
    found = []
    for number, name in enumerate(plan.shapes):
        for dim, positions in enumerate(plan.kept.get(name, ())):
            if positions is not None:
                found.append(torch.as_tensor(positions) + 10**6 * (10 * number + dim))
    return torch.cat(found)


def _overlap(one: torch.Tensor, other: torch.Tensor) -> float:
    """Positions that both keep, of those that either keeps."""
    both = torch.isin(one, other).sum().item()
    return both / (len(one) + len(other) - both)


def render(machine: dict[str, Any], found: list[dict[str, Any]]) -> str:
    """The Markdown page."""
    parts = [
        "# What STAMP's parts are worth",
        f"An eighth of the MACs, {_STEPS} steps in all, glyphs to Fashion-MNIST, accuracy in percent on the first "
        "3,000 test images. `python -m benchmarks.ablation` made this page. STAMP's own steps are among its "
        "seconds, not among the steps.",
        f"Machine: {machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, torch "
        f"{machine['torch']}, bfloat16 autocast.",
    ]
    runs = [row for row in found if "arm" in row]
    for network in dict.fromkeys(row["network"] for row in runs):
        lines = []
        for name in VARIANTS:
            same = [row for row in runs if (row["network"], row["arm"]) == (network, name)]
            if same:
                curves = [[100 * accuracy for _, _, accuracy in row["curve"]] for row in same]
                means = [f"{statistics.fmean(at):.1f}" for at in zip(*curves, strict=True)]
                spread = statistics.stdev(c[-1] for c in curves) if len(curves) > 1 else 0.0
                seconds = statistics.fmean(row["pruning_seconds"] for row in same)
                lines.append([name, *means[:-1], f"{means[-1]} ± {spread:.1f}", f"{seconds:.1f}", len(same)])
        marks = [f"{step}" for step, _, _ in runs[0]["curve"]]
        parts += [f"## {network}", markdown_table(["", *marks, "prune s", "seeds"], lines)]
    for row in found:
        if "overlap" in row:
            names = row["names"]
            lines = [[name, *(f"{v:.2f}" for v in values)] for name, values in zip(names, row["overlap"], strict=True)]
            parts += [
                f"## {row['network']}: different sets, different masks ({row['steps']} steps of the gates)",
                "Positions of weights that both keep, of those that either keeps; a and b are other images of one set.",
                markdown_table(["", *names], lines),
            ]
    return "\n\n".join(parts) + "\n"


@click.command()
@click.option("--network", default="vgg", show_default=True)
@click.option("--variant", "variants", multiple=True, default=tuple(VARIANTS), type=click.Choice(list(VARIANTS)))
@click.option("--seeds", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=_RESULTS)
@click.option("--page", type=click.Path(path_type=Path), default=Path("docs/ablation.md"))
def main(network: str, variants: tuple, seeds: int, threads: int, results: Path, page: Path) -> None:
    """Run the variants that the results do not hold yet, and write the page."""
    torch.set_num_threads(threads)
    if not results.exists():
        results.write_text(json.dumps({"machine": machine_info(threads)}) + "\n")

    def keep(row: dict[str, Any]) -> None:
        with results.open("a") as file:
            file.write(json.dumps(row) + "\n")

    done = {(row.get("arm"), row["network"], row.get("seed")) for row in rows(results)}
    for seed in range(seeds):
        for name in variants:
            if (name, network, seed) not in done:
                row = run(name, Task(network, "fashion", _MACS, seed, _STEPS), VARIANTS[name]())
                keep(row)
                click.echo(f"{network} seed {seed} {name}: {row['curve'][-1][2]:.1%}")
    for steps in (0, 20):
        if not any("overlap" in row and (row["network"], row["steps"]) == (network, steps) for row in rows(results)):
            masks = _masks(network, steps, 0)
            matrix = [[_overlap(one, other) for other in masks.values()] for one in masks.values()]
            keep({"network": network, "steps": steps, "names": list(masks), "overlap": matrix})
    page.write_text(render(json.loads(results.read_text().partition("\n")[0])["machine"], list(rows(results))))


if __name__ == "__main__":
    main()
