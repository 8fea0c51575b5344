"""What the commands share: their options, how errors end them, and how an answer is printed."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import torch

from stamp_fast.budget import Budget
from stamp_fast.errors import ArgumentError, StampFastError
from stamp_fast.methods import METHODS

from .sources import DataChoice, ModelChoice

NEW_FILE = click.Path(dir_okay=False, path_type=Path)
_OLD_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


# What messages call by the name it has in Python.
_OPTIONS = {
    "pass example=": "call stamp_fast.prune with example=",
    "pass loss_fn=": "give `stamp-fast prune` --loss package.module:function",
    "no generator= says": "no --generator says",
    "force=True": "--force",
    "keep=": "--keep ",
    "round_to=": "--round-to ",
}


@dataclasses.dataclass(frozen=True)
class Run:
    """Where a command runs, and what it says meanwhile, on stderr."""

    device: torch.device
    quiet: bool

    @property
    def progress(self) -> bool:
        return not self.quiet and sys.stderr.isatty()

    def say(self, text: str) -> None:
        if not self.quiet:
            click.echo(text, err=True)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a command prints on stdout: the text, or with --json the data."""

    text: str
    data: dict[str, Any]


# --- errors, device, JSON ---------------------------------------------------------------------------------------------
def common(command: Callable[..., Answer]) -> Callable[..., None]:
    """Adds the options of all commands; hands them on as `run`, prints the answer, and turns errors into exit codes."""

    @click.option("--device", default="cpu", show_default=True, callback=_device, help="cpu, cuda or cuda:1.")
    @click.option("--threads", type=click.IntRange(1), help="Threads of PyTorch on the CPU.")
    @click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
    @click.option("--quiet", is_flag=True, help="Nothing on stderr but errors: no notes, no progress.")
    @click.option("--debug", is_flag=True, help="Show the traceback of an error.")
    @functools.wraps(command)
    def wrapped(device: torch.device, threads: int | None, as_json: bool, quiet: bool, debug: bool, **given) -> None:
        if threads:
            torch.set_num_threads(threads)
        try:
            with _stdout_for_json() if as_json else contextlib.nullcontext():
                answer = command(run=Run(device, quiet), **given)
        except (StampFastError, OSError) as error:
            if debug:
                raise
            raise click.ClickException(as_options(str(error))) from error
        click.echo(json.dumps(_finite(answer.data), indent=2, allow_nan=False) if as_json else answer.text)

    return wrapped


@contextlib.contextmanager
def _stdout_for_json() -> Iterator[None]:
    """What a user's module prints, and what it starts prints, goes to stderr."""
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def as_options(message: str) -> str:
    """An error of the library in the words of the command line."""
    for argument, option in _OPTIONS.items():
        message = message.replace(argument, option)
    return message


def _device(context: click.Context, parameter: click.Parameter, value: str) -> torch.device:
    try:
        device = torch.device(value)
    except RuntimeError:
        raise click.BadParameter(f"'{value}' is no device of PyTorch; cpu, cuda and cuda:1 are") from None
    if device.type not in ("cpu", "cuda"):
        raise click.BadParameter(f"expected cpu or cuda, got '{value}'")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise click.BadParameter(f"this PyTorch ({torch.__version__}) sees {torch.cuda.device_count()} CUDA devices")
    return device


def new_file(context: click.Context, parameter: click.Parameter, value: Path | None) -> Path | None:
    """Refuses a file that cannot be written before an hour of work, not after it."""
    if value is None:
        return None
    folder = value.absolute().parent
    if not folder.is_dir():
        raise click.BadParameter(f"there is no folder '{folder}'; make it first")
    if not os.access(folder, os.W_OK):
        raise click.BadParameter(f"the folder '{folder}' cannot be written to")
    if value.exists() and not value.is_file():
        raise click.BadParameter(f"'{value}' is no ordinary file")
    return value


def check_apart(new: dict[str, Path | None], read: dict[str, Any]) -> None:
    """Refuses to write a file over one that is read, or over another.

    Args:
        new: by option, files that will be written.
        read: by option, files that are read, or what may be the name of one.
    """
    seen = {os.path.realpath(file): option for option, file in read.items() if file is not None and Path(file).exists()}
    for option, file in new.items():
        if file is None:
            continue
        other = seen.setdefault(os.path.realpath(file), option)
        if other != option:
            raise click.UsageError(f"{option}: '{file}' is {other}'s file too; give it a name of its own")


# --- the model --------------------------------------------------------------------------------------------------------
def model_options(command: Callable) -> Callable:
    """Adds MODEL and its options; hands them on as `model`."""

    @click.argument("model", metavar="MODEL")
    @click.option(
        "--weights", metavar="NAME", help="Pretrained weights of torchvision or timm: DEFAULT, or the name of some."
    )
    @click.option(
        "--classes",
        type=click.IntRange(1),
        help="Outputs of a torchvision or timm network; by default as many as DATA has classes.",
    )
    @click.option(
        "--state",
        type=_OLD_FILE,
        help="Weights to start from, a state_dict: .pt (read without pickle) or .safetensors.",
    )
    @click.option(
        "--into", metavar="MODEL", help="The dense network that MODEL, a file written by `prune`, was made from."
    )
    @functools.wraps(command)
    def wrapped(model: str, weights: str | None, classes: int | None, state: Path | None, into: str | None, **given):
        return command(model=ModelChoice(model, weights, classes, state, into), **given)

    return wrapped


# --- the data ---------------------------------------------------------------------------------------------------------
def data_options(required: bool) -> Callable[[Callable], Callable]:
    """Adds DATA and its options; hands them on as `data`. Where nothing is learned there are fewer."""
    more = [
        click.option("--mean", callback=_numbers, help="Per channel, e.g. 0.5,0.5,0.5. Default: likewise, ImageNet's."),
        click.option("--std", callback=_numbers, help="Like --mean."),
        click.option("--batch-size", type=click.IntRange(2), default=32, show_default=True),
        click.option("--workers", type=click.IntRange(0), default=0, help="Processes that load images."),
    ]

    def add(command: Callable) -> Callable:
        names = {field.name for field in dataclasses.fields(DataChoice)} - {"spec"}

        @functools.wraps(command)
        def wrapped(**given: Any):
            choice = DataChoice(given.pop("data"), **{name: given.pop(name) for name in names & given.keys()})
            return command(data=choice, **given)

        for option in reversed(more if required else []):
            wrapped = option(wrapped)
        shape = click.option(
            "--shape",
            metavar="C,H,W",
            callback=_shape,
            help="Channels, height and width of the images, e.g. 1,28,28. Default: what the network was pretrained on, "
            "where that is known, else 3,224,224.",
        )
        argument = click.argument("data", metavar="DATA" if required else "[DATA]", required=required)
        return argument(shape(wrapped))

    return add


def _shape(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    if value is None:
        return None
    try:
        shape = tuple(int(part) for part in value.split(","))
    except ValueError:
        shape = ()
    if len(shape) != 3 or min(shape) < 1:
        raise click.BadParameter(f"expected channels,height,width, e.g. 3,224,224, got '{value}'")
    return shape


def _numbers(context: click.Context, parameter: click.Parameter, value: str | None) -> tuple[float, ...] | None:
    try:
        return None if value is None else tuple(float(part) for part in value.split(","))
    except ValueError:
        raise click.BadParameter(f"expected numbers such as 0.5,0.5,0.5, got '{value}'") from None


# --- pruning ----------------------------------------------------------------------------------------------------------
def pruning_options(command: Callable) -> Callable:
    """Adds what `stamp_fast.prune` takes; hands it on as `pruning`, its keyword arguments."""
    names = ", ".join(field.name for field in dataclasses.fields(Budget))

    @click.option(
        "--budget",
        multiple=True,
        default=("macs=0.5",),
        show_default="macs=0.5",
        metavar="NAME=VALUE",
        callback=_budget,
        help=f"What may stay, of the whole network: {names}; the last three may be amounts, such as latency=12ms, "
        "memory=4GiB. Several: all must hold.",
    )
    @click.option("--method", type=click.Choice(list(METHODS)), default="stamp", show_default=True)
    @click.option("--generator", type=_OLD_FILE, help="For method stamp: a file of a meta-learned MaskGenerator.")
    @click.option("--steps", type=click.IntRange(0), default=20, show_default=True, help="Steps inside prune (stamp).")
    @click.option("--round-to", type=click.IntRange(1), help="Widths that are cut stay multiples of it.")
    @click.option("--keep", multiple=True, metavar="LAYER", help="A layer whose channels all stay. Repeatable.")
    @click.option("--strict", is_flag=True, help="What cannot be pruned is an error, not a line in the report.")
    @click.option("--force", is_flag=True, help="With a budget of time, go on where the result would not be faster.")
    @functools.wraps(command)
    def wrapped(
        budget: Budget,
        method: str,
        generator: Path | None,
        steps: int,
        round_to: int | None,
        keep: tuple[str, ...],
        strict: bool,
        force: bool,
        **given: Any,
    ):
        pruning = {"budget": budget, "method": method, "steps": steps, "round_to": round_to}
        pruning |= {"generator": generator, "keep": keep, "strict": strict, "force": force}
        return command(pruning=pruning, **given)

    return wrapped


def _budget(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> Budget:
    known = [field.name for field in dataclasses.fields(Budget)]
    asked: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise click.BadParameter(f"expected NAME=VALUE with one of {', '.join(known)}, got '{text}'")
        if name in asked:
            raise click.BadParameter(f"{name} is given twice")
        try:
            asked[name] = float(value)
        except ValueError:  # with a unit: Budget knows which it takes
            asked[name] = value
    try:
        return Budget(**asked)
    except ArgumentError as error:
        raise click.BadParameter(str(error)) from error
