"""`stamp-fast inspect`: what of a network could be pruned."""

from __future__ import annotations

from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from stamp_fast import ChannelGraph, trace
from stamp_fast.budget import minimum_width
from stamp_fast.data import Batches
from stamp_fast.errors import ModelError, TraceError
from stamp_fast.graph._model import layer_of
from stamp_fast.report.words import short_paths

from .options import Answer, Run, common, data_options, model_options
from .sources import Data, DataChoice, ModelChoice, open_model

_INLINE = 40  # letters of a reason in the table; longer ones are below it, once


@click.command(
    short_help="What of a network can be pruned, and why not the rest.",
    epilog="""
    \b
    Examples:
      stamp-fast inspect torchvision:mobilenet_v2
      stamp-fast inspect timm:resnet50 --classes 10 --shape 3,160,160
      stamp-fast inspect mymodel:make --shape 1,28,28 --json
      stamp-fast inspect "mymodel:make(width=32)" mydata:loader
      stamp-fast inspect small.safetensors --into mymodel:make
    """,
)
@model_options
@data_options(required=False)
@common
def inspect(run: Run, model: ModelChoice, data: DataChoice) -> Answer:
    """Show a network's layers: how many channels they have, which have to be pruned together, and what cannot be.

    MODEL is torchvision:NAME, timm:NAME, package.module:function (your own, called without arguments; the current
    folder can be imported), or a file written by `prune`. No weights are needed. DATA, a folder of images or
    package.module:loader, is only for a network that takes something else than images of --shape.
    """
    source = None if data.spec is None else Data(data)
    opened = open_model(model, run.device, None if source is None else source.outputs)
    network = opened.network
    if source is None:
        shape = data.shape or opened.images.shape
        example: Any = torch.zeros(2, *shape, device=run.device)
    else:
        source.prepare(opened.images)
        example = Batches(source.loader(source.train, shuffle=False), run.device).inputs()
        shape = tuple(example.shape[1:]) if isinstance(example, torch.Tensor) else None
    try:
        graph = trace(network, example)
    except TraceError as error:
        hint = (
            "say with --shape C,H,W what images it takes, or give DATA"
            if source is None
            else "are DATA and --shape for it?"
        )
        raise ModelError(f"{error} It was given {shape or 'a batch of DATA'}; {hint}") from error
    graph.settle()
    layers = _layers(graph)
    least = graph.all_kept()
    for group in graph.prunable:
        least[group.classes.start + 1 : group.classes.stop] = False
    found = {
        "model": model.spec,
        "class": type(network).__name__,
        "input_shape": None if shape is None else list(shape),
        "macs": graph.macs(),
        "params": graph.params(),
        "least_macs": graph.macs(least),
        "least_params": graph.params(least),
        "groups": [
            {
                "name": group.name,
                "channels": group.channels,
                "prunable": not _reason(group),
                "reason": _reason(group),
                "layers": [layer["name"] for layer in layers if layer["group"] == group.name],
            }
            for group in graph.groups + graph.frozen + graph.unlisted()
        ],
        "layers": layers,
    }
    return Answer(_text(found), found)


def _reason(group: Any) -> str:
    return group.reason or minimum_width(group, None)


def _layers(graph: ChannelGraph) -> list[dict[str, Any]]:
    """Every layer with a weight of two dims or more, in the network's order, and the group its outputs belong to."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    fixed = {group.name: group for group in graph.frozen + graph.unlisted()}
    for i, slot in enumerate(graph.slots):
        if not slot.is_parameter or slot.tensor.dim() < 2:
            continue
        name = layer_of(slot.name)
        if name in fixed:
            group = fixed[name]
            rows.setdefault((name, name), _row(name, group.channels, group))
        for dim, axis in enumerate(slot.axes):
            if axis is None or dim == graph.reader_dim(i):
                continue
            for group in graph.groups:
                count = int(((axis >= group.classes.start) & (axis < group.classes.stop)).sum())
                if count:
                    rows.setdefault((name, group.name), _row(name, count, group))
    return list(rows.values())


def _row(name: str, channels: int, group: Any) -> dict[str, Any]:
    reason = _reason(group)
    step = None if reason else channels / group.num_classes
    row = {"name": name, "channels": channels, "group": group.name, "step": step}
    return row | {"prunable": not reason, "reason": reason}


def _text(found: dict[str, Any]) -> str:
    console = Console(width=110, color_system=None, markup=False, emoji=False, highlight=False)
    shape = "" if found["input_shape"] is None else f", input {'x'.join(map(str, found['input_shape']))}"
    prunable = [group for group in found["groups"] if group["prunable"]]
    notes: list[str] = []
    table = Table()
    table.add_column("layer", overflow="fold")
    table.add_column("channels", justify="right")
    table.add_column("pruned together with", overflow="fold")
    table.add_column("can be pruned", overflow="fold")
    for layer in found["layers"]:
        verdict = "yes" if layer["prunable"] and layer["step"] == 1 else f"yes, {layer['step'] or 0:g} at a time"
        if not layer["prunable"]:
            reason = short_paths(layer["reason"])
            if len(reason) > _INLINE and reason not in notes:
                notes.append(reason)
            verdict = f"no: {reason}" if len(reason) <= _INLINE else f"no, see ({notes.index(reason) + 1})"
        other = "" if layer["group"] == layer["name"] else layer["group"]
        table.add_row(layer["name"], str(layer["channels"]), other, verdict)
    with console.capture() as capture:
        console.print(f"{found['model']} ({found['class']}{shape})", soft_wrap=True)
        console.print(f"MACs {found['macs'] / 1e6:,.1f} M, params {found['params'] / 1e3:,.1f} k")
        macs, params = found["least_macs"] / max(1, found["macs"]), found["least_params"] / max(1, found["params"])
        console.print(
            f"{len(prunable)} of {len(found['groups'])} groups of channels can be pruned; as far as that goes, "
            f"{macs:.2%} of the MACs and {params:.2%} of the params would stay",
            soft_wrap=True,
        )
        console.print(table)
        for number, note in enumerate(notes, 1):
            console.print(f"({number}) {note}", soft_wrap=True)
    return capture.get().rstrip()
