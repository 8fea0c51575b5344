"""`stamp-fast bench`: is pruning worth it for this network and this data, and which way?"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from stamp_fast.data import Batches

from .arms import Arm, Recipe, check_held_out, check_names, evaluate, make_arms, timed_steps, train
from .options import Answer, Run, common, data_options, model_options, pruning_options
from .sources import Data, DataChoice, ModelChoice, open_model

_EPOCHS = 3
_CLEAR = 0.8  # of the rounds that one arm's step has to be the faster one in, to be called faster
_EQUAL = 0.05  # of our MACs: arms that differ by more are not of one size


@click.command(
    short_help="Pruned in several ways, trained alike, compared.",
    epilog="""
    \b
    Examples:
      stamp-fast bench torchvision:resnet18 pets/ --weights DEFAULT --budget macs=0.35 --epochs 10 --seeds 3
      stamp-fast bench mymodel:make mydata:loader --val mydata:val_loader --train-steps 500
      stamp-fast bench mymodel:make digits/ --compare dense,random,uniform,scratch,torch-pruning --json

    \b
    What --compare takes:
      dense                 the whole network; always takes part
      random                channels by lot, the same share of every layer
      uniform               the smallest L1 norms go, the same share of every layer
      scratch               the widths that our method chose, all weights drawn anew
      torch-pruning         the library, magnitude, the same share of every layer, at our MACs
      torch-pruning-global  the same, ranked over all layers
      taylor, bn_scale, magnitude, stamp    methods of `prune`
    """,
)
@model_options
@data_options(required=True)
@click.option(
    "--val",
    metavar="DATA",
    help="What to evaluate on. Default: DATA/val, else a fifth of a folder, a Dataset or a list is held out.",
)
@pruning_options
@click.option("--compare", default="dense,random,uniform,scratch", show_default=True, help="See below.")
@click.option("--epochs", type=click.IntRange(1), help=f"Of training, for every arm.  [default: {_EPOCHS}]")
@click.option("--train-steps", type=click.IntRange(1), help="Steps of training, instead of --epochs.")
@click.option(
    "--lr", type=click.FloatRange(0, min_open=True), default=0.02, show_default=True, help="The schedule's peak."
)
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="Runs, with seeds 0, 1, ...")
@common
def bench(
    run: Run,
    model: ModelChoice,
    data: DataChoice,
    val: str | None,
    pruning: dict[str, Any],
    compare: str,
    epochs: int | None,
    train_steps: int | None,
    lr: float,
    seeds: int,
) -> Answer:
    """Prune MODEL for DATA in several ways, train each alike, and compare.

    All arms start from the same weights and get the same batches, steps and schedule (SGD, no augmentation), in turns,
    so that the times can be compared. Times are wall times; the MACs are there to show that the arms are of one size.
    MODEL and DATA are as for `prune`.
    """
    names = list(dict.fromkeys(name.strip() for name in compare.split(",") if name.strip()))
    check_names(names)
    if epochs is not None and train_steps is not None:
        raise click.UsageError("--epochs and --train-steps: give one of them")
    source = Data(data, val, evaluates=True)
    held_out = source.split()
    rows: list[tuple[int, list[Arm]]] = []
    recipe = None
    for seed in range(seeds):
        torch.manual_seed(seed)
        opened = open_model(model, run.device, source.outputs)
        images = source.prepare(opened.images)
        source.check_outputs(opened, images.shape)
        loader = source.loader(source.train, shuffle=True)
        if recipe is None:
            steps = train_steps or (epochs or _EPOCHS) * _length(loader, run.device)
            recipe = Recipe(steps, lr)
            check_held_out(opened.network, source.loader(source.val, shuffle=False), run.device)
            batch_size = Batches(loader, run.device).batch_size()
            for note in (*opened.notes, *source.notes(images), held_out):
                run.say(f"note: {note}")
        arms = make_arms(opened.network, loader, names, pruning, seed, run)
        torch.manual_seed(seed)
        with tqdm(total=recipe.steps, desc=f"seed {seed}: training", disable=not run.progress, leave=False) as bar:
            train(arms, loader, run.device, recipe, bar.update)
        evaluate(arms, loader, source.loader(source.val, shuffle=False), run.device)
        for arm in arms:
            arm.network = None
            said = arm.failure or f"accuracy {arm.accuracy:.1%} after {recipe.steps} steps"
            run.say(f"seed {seed}: {arm.name}: {said}")
        rows.append((seed, arms))
    return _answer(model, data, pruning, recipe, batch_size, held_out, rows, run)


def _length(loader: Any, device: torch.device) -> int:
    length = Batches(loader, device).length()
    if length is None:
        raise click.UsageError("--train-steps: say how many; the loader does not know its length")
    return length


# --- the answer -------------------------------------------------------------------------------------------------------
def _answer(
    model: ModelChoice,
    data: DataChoice,
    pruning: dict,
    recipe: Recipe,
    batch_size: int,
    held_out: str,
    rows: list,
    run: Run,
) -> Answer:
    names = [arm.name for arm in rows[0][1]]
    # Each run beside the dense one and ours of its seed; they had the same batches in turns.
    by_name = {name: [(arm, *arms[:2]) for _, arms in rows for arm in arms if arm.name == name] for name in names}
    summary = {name: _summary(runs) for name, runs in by_name.items()}
    ours = pruning["method"]
    losses, gains = _verdicts(summary, ours)
    notes = sorted({arm.note for _, arms in rows for arm in arms if arm.note}) + _notes(summary, ours)
    found = {
        "model": model.spec,
        "data": data.spec,
        "held_out": held_out,
        "method": ours,
        "budget": pruning["budget"].asked(),
        "recipe": dataclasses.asdict(recipe) | {"batch_size": batch_size},
        "seeds": [seed for seed, _ in rows],
        "machine": {"device": str(run.device), "threads": torch.get_num_threads(), "torch": torch.__version__},
        "arms": summary,
        "gains": gains,
        "losses": losses,
        "notes": notes,
    }
    return Answer(_text(found), found)


def _summary(runs: list[tuple[Arm, Arm, Arm]]) -> dict[str, Any]:
    """One arm over all seeds."""
    failures = [arm.failure for arm, *_ in runs if arm.failure]
    if failures:
        return {"failed": failures[0], "failures": len(failures), "runs": len(runs)}
    ratios, faster = [], []
    for arm, dense, ours in runs:
        pairs = zip(timed_steps(arm), timed_steps(dense), strict=True)
        ratios.append(statistics.median(own / whole for own, whole in pairs))
        faster += [own < best for own, best in zip(timed_steps(arm), timed_steps(ours), strict=False)]
    accuracies = [arm.accuracy for arm, *_ in runs]
    return {
        "failed": None,
        "accuracy": statistics.mean(accuracies),
        "accuracy_spread": statistics.stdev(accuracies) if len(runs) > 1 else None,
        "accuracies": accuracies,
        "loss": statistics.mean(arm.loss for arm, *_ in runs),
        "train_step_ms": 1e3 * statistics.mean(statistics.median(timed_steps(arm)) for arm, *_ in runs),
        "train_step_ratio": statistics.mean(ratios),
        "steps_faster_than_ours": statistics.mean(faster) if faster else 0.0,
        "macs_ratio": statistics.mean(arm.macs for arm, *_ in runs),
        "params_ratio": statistics.mean(arm.params for arm, *_ in runs),
        "prune_seconds": statistics.mean(arm.prune_seconds for arm, *_ in runs),
        "train_seconds": statistics.mean(sum(arm.step_seconds) for arm, *_ in runs),
        "steps": len(runs[0][0].step_seconds),
    }


def _notes(summary: dict[str, dict], ours: str) -> list[str]:
    """What is not alike about the arms."""
    notes, size = [], summary[ours].get("macs_ratio", math.nan)
    for name, arm in summary.items():
        if name != "dense" and not arm["failed"] and abs(arm["macs_ratio"] / size - 1) > _EQUAL:
            notes.append(f"{name} is NOT of equal size: {arm['macs_ratio']:.1%} of the MACs, {ours} {size:.1%}")
    if "stamp" in summary:
        notes.append("stamp also trains while it prunes; those seconds are counted, those steps are not")
    if any(name.startswith("torch-pruning") for name in summary):
        notes.append(
            "the time to prune of Torch-Pruning is one step of it; the ratio that gives our MACs was searched untimed, "
            "and it neither verifies, recalibrates nor measures, as `prune` does"
        )
    return notes


def _verdicts(summary: dict[str, dict], ours: str) -> tuple[list[str], list[str]]:
    """Where our method lost to another arm, and where it won, in words."""
    losses, gains, own = [], [], summary[ours]
    if own["failed"]:
        return [f"{ours} failed: {own['failed']}"], []
    for name, other in summary.items():
        if name == ours or other["failed"]:
            continue
        judged = []  # what, theirs, ours, whether theirs is better
        if other["accuracy"] != own["accuracy"]:
            spread = math.hypot(own["accuracy_spread"] or 0, other["accuracy_spread"] or 0)
            what = "accuracy, within the spread" if abs(other["accuracy"] - own["accuracy"]) < spread else "accuracy"
            texts = (f"{100 * arm['accuracy']:.1f} %" for arm in (other, own))
            judged.append((what, *texts, other["accuracy"] > own["accuracy"]))
        share = other["steps_faster_than_ours"]
        if name != "scratch" and max(share, 1 - share) >= _CLEAR:  # scratch is the same architecture
            texts = (f"{arm['train_step_ratio']:.2f} of dense's" for arm in (other, own))
            judged.append(("train step", *texts, share > 0.5))
        texts = [f"{arm['prune_seconds']:.1f} s" for arm in (other, own)]
        if name not in ("dense", "scratch") and texts[0] != texts[1]:
            judged.append(("time to prune", *texts, other["prune_seconds"] < own["prune_seconds"]))
        lost = [f"{what} ({theirs} against {mine})" for what, theirs, mine, better in judged if better]
        won = [f"{what} ({mine} against {theirs})" for what, theirs, mine, better in judged if not better]
        if lost:
            losses.append(f"{name} beat {ours} in {', '.join(lost)}")
        if won:
            gains.append(f"{ours} beat {name} in {', '.join(won)}")
    return losses, gains


def _text(found: dict[str, Any]) -> str:
    console = Console(width=120, color_system=None, markup=False, emoji=False, highlight=False)
    recipe, ours = found["recipe"], found["method"]
    asked = ", ".join(f"{name}={value}" for name, value in found["budget"].items())
    machine, count = found["machine"], found["machine"]["threads"]
    threads = f"{count} thread{'s' * (count > 1)}"
    table = Table(title=f"{found['model']} on {found['data']}, {asked}, {recipe['steps']} steps each")
    table.add_column("", overflow="fold")
    for heading in ("accuracy", "val loss", "train step", "of dense's", "MACs", "params", "prune", "prune + train"):
        table.add_column(heading, justify="right")
    for name, arm in found["arms"].items():
        if arm["failed"]:
            table.add_row(name, "failed")
            continue
        spread = "" if arm["accuracy_spread"] is None else f" ± {100 * arm['accuracy_spread']:.1f}"
        table.add_row(
            name,
            f"{100 * arm['accuracy']:.1f}{spread} %",
            f"{arm['loss']:.3f}",
            f"{arm['train_step_ms']:.1f} ms",
            f"{arm['train_step_ratio']:.2f}",
            f"{arm['macs_ratio']:.1%}",
            f"{arm['params_ratio']:.1%}",
            f"{arm['prune_seconds']:.1f} s",
            f"{arm['prune_seconds'] + arm['train_seconds']:.1f} s",
        )
    lines = [
        f"failed: {name} in {arm['failures']} of {arm['runs']} runs: {arm['failed']}"
        for name, arm in found["arms"].items()
        if arm["failed"]
    ]
    lines += [f"note: {note}" for note in found["notes"]]
    count = len(found["seeds"])
    lines.append(f"{count} seed{'s' * (count > 1)}{'' if count > 1 else ', so no spread'}; {found['held_out']}")
    lines.append(f"{machine['device']}, {threads}, torch {machine['torch']}; wall times, steps in turns")
    dense, own = found["arms"]["dense"], found["arms"][ours]
    if not own["failed"]:
        before, after = dense["train_seconds"], own["prune_seconds"] + own["train_seconds"]
        word = f"{before / after:.2f}x faster" if after < before else f"{after / before:.2f}x SLOWER"
        lines.append(f"{ours}, pruning and training: {word} than training dense ({after:.1f} s, {before:.1f} s)")
    lines += found["gains"]
    lines += [f"LOST: {loss}" for loss in found["losses"]] or [f"no other arm beat {ours} in anything measured"]
    with console.capture() as capture:
        console.print(table)
        for line in lines:
            console.print(line, soft_wrap=True)
    return capture.get().rstrip()
