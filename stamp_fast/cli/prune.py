"""`stamp-fast prune`: a smaller network in a file, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import torch
from rich.filesize import decimal

import stamp_fast

from .imports import import_function
from .options import NEW_FILE, Answer, Run, check_apart, common, data_options, model_options, new_file, pruning_options
from .sources import Data, DataChoice, ModelChoice, open_model


@click.command(
    short_help="Prune a network for a data set and save it.",
    epilog="""
    \b
    Examples:
      stamp-fast prune torchvision:resnet18 pets/ --weights DEFAULT --budget macs=0.35
      stamp-fast prune timm:resnet50 pets/ --weights DEFAULT --budget macs=0.5 --budget params=0.6 --round-to 8
      stamp-fast prune mymodel:make mydata:loader --state trained.pt --method taylor --output half.safetensors
      stamp-fast prune mymodel:make mydata:loader --state trained.pt --budget train_step=0.5 --html report.html
      stamp-fast prune small.safetensors pets/ --into torchvision:resnet18 --output smaller.safetensors

    \b
    DATA is a folder, with or without train/ (and val/) in between:
      pets/cat/1.png  pets/dog/2.png        or        pets/train/cat/1.png  pets/val/cat/9.png
    or package.module:name, a DataLoader, a Dataset, a list of (images, labels) batches, or a function that gives one.
    """,
)
@model_options
@data_options(required=True)
@pruning_options
@click.option("--loss", metavar="MODULE:FUNCTION", help="(model, batch) -> loss. Default: cross entropy.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Makes the result repeatable.")
@click.option(
    "--output",
    type=NEW_FILE,
    default="small.safetensors",
    show_default=True,
    callback=new_file,
    help="Where the pruned network goes.",
)
@click.option("--html", type=NEW_FILE, callback=new_file, help="Write the report as a web page, too.")
@common
def prune(
    run: Run,
    model: ModelChoice,
    data: DataChoice,
    pruning: dict[str, Any],
    loss: str | None,
    seed: int,
    output: Path,
    html: Path | None,
) -> Answer:
    """Prune MODEL for DATA and save the smaller network.

    MODEL is torchvision:NAME, timm:NAME, package.module:function (your own, called without arguments; the current
    folder can be imported), or a file written by this command. The pruned network is trained as before: load it as the
    last lines of the output say.
    """
    read = {"MODEL": model.spec, "--state": model.state, "--generator": pruning["generator"]}
    check_apart({"--output": output, "--html": html}, read)
    loss_fn = None if loss is None else import_function(loss, "--loss")
    source = Data(data)
    torch.manual_seed(seed)
    opened = open_model(model, run.device, source.outputs)
    images = source.prepare(opened.images)
    if loss is None:
        source.check_outputs(opened, images.shape)
    for note in (*opened.notes, *source.notes(images)):
        run.say(f"note: {note}")
    loader = source.loader(source.train, shuffle=True)
    stamp_fast.prune(opened.network, loader, loss_fn=loss_fn, seed=seed, progress=run.progress, **pruning)
    report = stamp_fast.report(opened.network)
    if html is not None:
        report.to_html(html)
    stamp_fast.save(opened.network, output)
    code = opened.load_code(output)
    pages = "" if html is None else f"report: {html}\n"
    text = f"{report}\n{pages}saved {output} ({decimal(output.stat().st_size)}). To load it:\n\n{_indented(code)}"
    more = {"output": str(output), "html": None if html is None else str(html), "load": code, "seed": seed}
    more |= {"model": model.spec, "class": report.model, "data": data.spec}  # named as by `inspect`
    return Answer(text, json.loads(report.to_json()) | more)


def _indented(code: str) -> str:
    return "\n".join(f"    {line}" for line in code.splitlines())
