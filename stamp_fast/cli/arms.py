"""The networks that `bench` puts side by side, and the one training that all of them get."""

from __future__ import annotations

import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import click
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

import stamp_fast
from stamp_fast import trace
from stamp_fast._phases import in_mode
from stamp_fast.data import Batches, cross_entropy, guarded, logits_of, some_examples
from stamp_fast.errors import LoaderError, ModelError
from stamp_fast.graph._undisturbed import attributes_restored
from stamp_fast.metapruning.genome import draw_weights
from stamp_fast.methods import METHODS
from stamp_fast.recalibrate import recalibrate

from .options import Run

# What --compare takes, besides the methods of `prune`.
BASELINES = ("dense", "uniform", "scratch", "torch-pruning", "torch-pruning-global")
_RECALIBRATION_BATCHES = 10
_WARM_UP_STEPS = 3  # are not timed
_TRIES = 9  # of ratios for Torch-Pruning


@dataclasses.dataclass
class Arm:
    """One network in one seed's comparison.

    Attributes:
        prune_seconds: wall time until the network was there.
        macs, params: of the network, as a fraction of the dense one's.
        step_seconds: wall time of forward, backward and optimizer, for every step.
        accuracy, loss: on what was held out, after the last step.
        failure: why it fell out; "" where it did not.
    """

    name: str
    network: nn.Module | None
    prune_seconds: float = 0.0
    macs: float = 1.0
    params: float = 1.0
    step_seconds: list[float] = dataclasses.field(default_factory=list)
    accuracy: float = math.nan
    loss: float = math.nan
    failure: str = ""
    note: str = ""

    def fail(self, error: Exception) -> None:
        self.failure, self.network = f"{type(error).__name__}: {error}", None


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The training of every arm: SGD with momentum, a short warm-up, then half a cosine."""

    steps: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4

    def optimizer(self, network: nn.Module) -> tuple[torch.optim.Optimizer, LambdaLR]:
        trainable = [parameter for parameter in network.parameters() if parameter.requires_grad]
        if not trainable:
            raise ModelError("MODEL: all of its parameters are frozen, so there is nothing to train and to compare")
        optimizer = torch.optim.SGD(
            trainable, self.lr, momentum=self.momentum, nesterov=True, weight_decay=self.weight_decay
        )
        rise = max(1, min(20, self.steps // 5))

        def rate(step: int) -> float:
            return min(1, (step + 1) / rise) * (1 + math.cos(math.pi * step / self.steps)) / 2

        return optimizer, LambdaLR(optimizer, rate)


# --- making them ------------------------------------------------------------------------------------------------------
def make_arms(
    dense: nn.Module, loader: Iterable[Any], names: Sequence[str], pruning: dict[str, Any], seed: int, run: Run
) -> list[Arm]:
    """The dense network, ours, and those asked for.

    Raises:
        StampFastError: ours cannot be pruned. A baseline that fails is an arm with the reason.
    """
    torch.manual_seed(seed)
    example = some_examples(Batches(loader, run.device).inputs(), 2)
    whole = trace(dense, example)

    def sized(arm: Arm) -> Arm:
        graph = trace(arm.network, example)
        arm.macs, arm.params = graph.macs() / whole.macs(), graph.params() / whole.params()
        run.say(f"seed {seed}: {arm.name}: {arm.macs:.1%} of the MACs, made in {arm.prune_seconds:.1f} s")
        return arm

    ours = sized(_pruned(dense, loader, pruning, seed, run))
    arms = [Arm("dense", copy.deepcopy(dense)), ours]
    for name in names:
        if name in ("dense", ours.name) or (name, ours.name) == ("uniform", "magnitude"):
            continue
        try:
            if name == "scratch":
                arm = _scratch(ours, seed)
            elif name.startswith("torch-pruning"):
                arm = _torch_pruned(name, dense, example, ours.macs, pruning)
            else:
                method = "magnitude" if name == "uniform" else name
                more = {"method": method, "generator": None}
                arm = dataclasses.replace(_pruned(dense, loader, pruning | more, seed, run), name=name)
            arms.append(sized(arm))
        except Exception as error:  # whatever another library raises
            arms.append(Arm(name, None))
            arms[-1].fail(error)
            run.say(f"seed {seed}: {name}: failed: {arms[-1].failure}")
    return arms


def _pruned(dense: nn.Module, loader: Iterable[Any], pruning: dict[str, Any], seed: int, run: Run) -> Arm:
    network = copy.deepcopy(dense)
    torch.manual_seed(seed)
    begin = time.perf_counter()
    stamp_fast.prune(network, loader, seed=seed, progress=run.progress, **pruning)
    return Arm(pruning["method"], network, time.perf_counter() - begin)


def _scratch(ours: Arm, seed: int) -> Arm:
    """Our architecture with new weights, all of them trained; it took our search to find it."""
    network = copy.deepcopy(ours.network).requires_grad_()
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    torch.manual_seed(seed)
    draw_weights(network)
    # What is all ones or zeros is so at every start.
    left = [
        name
        for name, parameter in network.named_parameters()
        if torch.equal(parameter, before[name]) and not bool((parameter == parameter.flatten()[0]).all())
    ]
    note = (
        f"scratch: the layers have no reset_parameters, so these keep their values: {', '.join(left)}" if left else ""
    )
    return Arm("scratch", network, ours.prune_seconds, note=note)


def _torch_pruned(name: str, dense: nn.Module, example: Any, macs: float, pruning: dict[str, Any]) -> Arm:
    """Torch-Pruning's network of as many MACs as ours. It takes a ratio of channels: which one is searched untimed."""
    tp = torch_pruning()
    round_to, keep = pruning["round_to"], pruning["keep"]
    whole = trace(dense, example).macs()

    def pruned(ratio: float) -> tuple[nn.Module, float]:
        network = copy.deepcopy(dense).eval()
        fixed = {id(parameter) for parameter in trace(network, example).output_parameters()}
        for layer in keep:
            fixed |= {id(parameter) for parameter in network.get_submodule(layer).parameters()}
        ignored = [m for m in network.modules() if any(id(p) in fixed for p in m.parameters(recurse=False))]
        begin = time.perf_counter()
        tp.pruner.MagnitudePruner(
            network,
            example,
            importance=tp.importance.GroupMagnitudeImportance(p=2),
            global_pruning=name.endswith("global"),
            pruning_ratio=ratio,
            ignored_layers=ignored,
            round_to=round_to,
        ).step()
        seconds = time.perf_counter() - begin
        for own, whole_one in zip(network.parameters(), dense.parameters(), strict=True):
            own.requires_grad_(whole_one.requires_grad)  # it makes all of them trainable
        return network.train(dense.training), seconds

    low, high, tried = 0.0, 1.0, {}
    for _ in range(_TRIES):
        ratio = (low + high) / 2
        try:
            tried[ratio] = trace(pruned(ratio)[0], example).macs() / whole - macs
        except Exception:  # of a network cut down too far
            high = ratio
            continue
        low, high = (ratio, high) if tried[ratio] > 0 else (low, ratio)
    best = min(tried, key=lambda ratio: abs(tried[ratio]), default=(low + high) / 2)
    return Arm(name, *pruned(best))


def torch_pruning() -> Any:
    """The library.

    Raises:
        click.ClickException: it is not installed.
    """
    try:
        import torch_pruning as library
    except ImportError as error:
        raise click.ClickException(
            f"--compare torch-pruning: the library cannot be imported ({error}): pip install torch-pruning"
        ) from error
    return library


# --- training them ----------------------------------------------------------------------------------------------------
def train(
    arms: list[Arm], loader: Iterable[Any], device: torch.device, recipe: Recipe, on_step: Callable[[], None]
) -> None:
    """Trains all arms on the same batches, step by step in turns, so that what disturbs the machine disturbs all."""
    states = {arm.name: recipe.optimizer(arm.network.train()) for arm in arms if arm.network is not None}
    for number, batch in enumerate(Batches(loader, device).take(recipe.steps)):
        first = number % len(arms)  # nobody always comes after the same neighbour
        for arm in arms[first:] + arms[:first]:
            if arm.network is None:
                continue
            try:
                arm.step_seconds.append(_step(arm.network, batch, *states[arm.name]))
            except Exception as error:
                if arm.name == "dense":  # no baseline can be judged where the data is at fault
                    raise
                arm.fail(error)
        on_step()


def _step(network: nn.Module, batch: Any, optimizer: torch.optim.Optimizer, schedule: LambdaLR) -> float:
    _synchronize()
    begin = time.perf_counter()
    optimizer.zero_grad(set_to_none=True)
    loss = cross_entropy(network, batch)
    loss.backward()
    optimizer.step()
    _synchronize()
    seconds = time.perf_counter() - begin
    schedule.step()
    if not bool(torch.isfinite(loss)):
        raise LoaderError(f"the training loss became {loss.item()}; try a smaller --lr")
    return seconds


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


# --- judging them -----------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(arms: list[Arm], train_loader: Iterable[Any], val_loader: Iterable[Any], device: torch.device) -> None:
    """Accuracy and cross entropy on what was held out, batch norm's statistics taken anew for all arms alike."""
    standing = [arm for arm in arms if arm.network is not None]
    batches = Batches(train_loader, device)
    for arm in standing:
        recalibrate(arm.network, batches.take(_RECALIBRATION_BATCHES), guarded(cross_entropy))
        arm.network.eval()
    found, count = {id(arm): [0, 0.0] for arm in standing}, 0
    for batch in _held_out(val_loader, device):
        count += len(batch[1])
        for arm in standing:
            if arm.network is None:
                continue
            try:
                right, loss = _judged(arm.network, batch)
            except Exception as error:
                if arm.name == "dense":  # no baseline can be judged where the data is at fault
                    raise
                arm.fail(error)
                continue
            found[id(arm)][0] += right
            found[id(arm)][1] += loss
    for arm in standing:
        if not arm.failure:
            arm.accuracy, arm.loss = (value / count for value in found[id(arm)])


@torch.no_grad()
def check_held_out(network: nn.Module, val_loader: Iterable[Any], device: torch.device) -> None:
    """
    Raises:
        LoaderError: the network cannot be judged on the first batch; better now than after the training.
    """
    first = next(_held_out(val_loader, device), None)
    if first is None:
        raise LoaderError("--val: has no examples")
    with attributes_restored(network), in_mode(network, training=False):
        _judged(network, first)


def _held_out(val_loader: Iterable[Any], device: torch.device) -> Iterator[Any]:
    try:
        batches = Batches(val_loader, device).one_pass()
        for batch in batches:
            images, labels = batch if isinstance(batch, (tuple, list)) and len(batch) == 2 else (None, None)
            if not isinstance(labels, torch.Tensor) or labels.dim() != 1 or labels.is_floating_point():
                raise LoaderError("bench measures accuracy and needs (images, class indices) batches")
            if len(labels):
                yield images, labels
    except LoaderError as error:
        raise LoaderError(f"--val: {error}") from error


def _judged(network: nn.Module, batch: Any) -> tuple[int, float]:
    """Right answers, and the sum of the cross entropies."""
    images, labels = batch
    try:
        logits = logits_of(network(images)).float()
    except Exception as error:
        raise LoaderError(f"--val: the network cannot take its images: {type(error).__name__}: {error}") from error
    if logits.dim() != 2 or len(logits) != len(labels):
        raise LoaderError(f"--val: the network gives {tuple(logits.shape)} for {len(labels)} labels")
    if not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
        least, most = int(labels.min()), int(labels.max())
        raise LoaderError(f"--val: labels are {least} to {most}, and the network has {logits.shape[1]} outputs")
    return int((logits.argmax(1) == labels).sum()), F.cross_entropy(logits, labels, reduction="sum").item()


def timed_steps(arm: Arm) -> list[float]:
    """Step times without the first few."""
    return arm.step_seconds[min(_WARM_UP_STEPS, len(arm.step_seconds) // 4) :]


def check_names(names: Sequence[str]) -> None:
    """Refuses what --compare does not know, and a library that is not there."""
    known = [*BASELINES, *METHODS]
    for name in names:
        if name not in known:
            raise click.BadParameter(f"'{name}' is none of {', '.join(known)}", param_hint="--compare")
    if any(name.startswith("torch-pruning") for name in names):
        torch_pruning()


__all__ = ["Arm", "Recipe", "check_names", "evaluate", "make_arms", "timed_steps", "train"]
