"""Time and peak memory of a training step, whole and by layer, and time of a forward: measured."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..data import LossFn, check_forward, cross_entropy, guarded
from ..errors import ModelError
from ..graph._model import unwrapped
from ..graph._record import call_model, fresh
from ..graph._undisturbed import uncompiled
from .timeline import OPTIMIZER, OTHER, Timeline

_ROUNDS = 9  # at most, of whole steps; more in a longer time
_ROUNDS_BY_LAYER = 3
_SECONDS = 1.0
_FORWARD_SECONDS = 0.3


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One training step: forward, backward, step of SGD with momentum.

    Attributes:
        milliseconds: median over `steps`.
        peak_bytes: most that was allocated at a time during the step; weights, gradients, momentum and the batch count.
        layers: milliseconds of every layer that ran, forward and backward, in the order of their forwards, then
            "(optimizer)" and "(other)", which is all between layers and the loss. Their sum is `milliseconds`.
        steps: how many were timed.
    """

    milliseconds: float
    peak_bytes: int
    layers: dict[str, float]
    steps: int


def compare_steps(
    models: list[nn.Module],
    batch: Any,
    loss_fn: LossFn,
    seconds: float = _SECONDS,
) -> list[StepCost]:
    """Costs of the models' training steps on one batch, timed in turns so that noise meets all alike.

    The models are trained in place: hand in copies. At least one timed step each, about `seconds` in all. Marks between
    layers cost some microseconds each: the whole step is timed without. The layers' shares are those of the marked
    steps.
    """
    device = _device_of(models[0])
    with _own_rng(device):
        steps = [_Step(model, batch, loss_fn, device) for model in models]
        peaks = [step.peak_bytes() for step in steps]
        end = time.perf_counter() + seconds
        by_layer: list[list[dict[str, float]]] = [[] for _ in steps]
        whole: list[list[float]] = [[] for _ in steps]
        rounds = _ROUNDS * max(1.0, seconds / _SECONDS)
        while not whole[0] or (time.perf_counter() < end and len(whole[0]) < rounds):
            for step, taken in zip(steps, whole, strict=True):
                taken.append(timed(functools.partial(step.run, fresh(batch)), device))
            if not by_layer[0] or (time.perf_counter() < end and len(by_layer[0]) < _ROUNDS_BY_LAYER):
                for step, taken in zip(steps, by_layer, strict=True):
                    taken.append(step.by_layer())
    return [_cost(*measured) for measured in zip(whole, by_layer, peaks, strict=True)]


def compare_forwards(models: list[nn.Module], inputs: Any, seconds: float = _FORWARD_SECONDS) -> list[float]:
    """Milliseconds of the models' forwards in eval mode, without gradients, in turns; medians.

    Args:
        models: left in eval mode: hand in copies.
        inputs: what a forward takes: tensor, tuple or dict.
        seconds: in all, about; every model runs once at least.
    """
    device = _device_of(models[0])
    taken: list[list[float]] = [[] for _ in models]
    end = time.perf_counter() + seconds
    rounds = _ROUNDS * max(1.0, seconds / _FORWARD_SECONDS)
    with _own_rng(device), torch.no_grad():
        while not taken[0] or (time.perf_counter() < end and len(taken[0]) <= rounds):
            for model, times in zip(models, taken, strict=True):
                model.eval()
                times.append(timed(functools.partial(call_model, model, fresh(inputs)), device))
    # The first forward is slower, and counts only where it is the only one.
    return [1000 * statistics.median(times[1:] or times) for times in taken]


def layer_times(model: nn.Module, batch: Any, loss_fn: LossFn = cross_entropy) -> dict[str, float]:
    """Milliseconds of a training step (forward, backward, SGD) that every layer of the model takes.

    The model is left as it is: a copy is trained.

    Args:
        batch: as `loss_fn` takes it, on the model's device.

    Returns:
        By the layers' names, in the order of their forwards; then "(optimizer)" and "(other)", which is all between
        layers and the loss. The sum is the time of the step.

    Raises:
        ModelError: the model cannot be copied.
        LoaderError: model or loss cannot take the batch.
        ArgumentError: the loss is no scalar, or does not depend on the model's parameters.
    """
    copied = copy_of(unwrapped(model))
    if copied is None:
        raise ModelError(
            "layer_times: the model cannot be copied, and measuring would change it; give its classes a __deepcopy__, "
            "or take out of its attributes what copy.deepcopy refuses (open files, locks, generators)"
        )
    loss = guarded(loss_fn)
    with uncompiled():
        check_forward(copied, batch, loss)
        return compare_steps([copied], batch, loss)[0].layers


def copy_of(model: nn.Module) -> nn.Module | None:
    """A copy for measurements, None where something in the model refuses."""
    # Tensors that the last forward has left in attributes (a weight computed by a hook) hold on to its graph.
    computed = [t for m in model.modules() for t in tree_leaves(vars(m)) if isinstance(t, torch.Tensor) and t.grad_fn]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    except Exception:  # a model may hold anything
        return None


class _Step:
    """The training step of a model on a batch."""

    def __init__(self, model: nn.Module, batch: Any, loss_fn: LossFn, device: torch.device) -> None:
        self.model, self.batch, self.loss_fn, self.device = model.train(), batch, loss_fn, device
        trainable = [p for p in model.parameters() if p.requires_grad]
        if not trainable:  # a wholly frozen network costs what it would cost if it were trained
            trainable = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
        # The work of a step, without its effect: a loss of any scale stays finite.
        self.optimizer = torch.optim.SGD(trainable, lr=0.0, momentum=0.9)

    def run(self, batch: Any) -> None:
        """
        Args:
            batch: a copy that the forward may work on in place.
        """
        self.optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            self.loss_fn(self.model, batch).backward()
        self.optimizer.step()

    def by_layer(self) -> dict[str, float]:
        """Seconds of one step, by layer."""
        timeline, batch = Timeline(*_clock(self.device)), fresh(self.batch)
        wait(self.device)
        with timeline.watching(self.model):
            timeline.mark(OPTIMIZER)
            self.optimizer.zero_grad(set_to_none=True)
            timeline.mark(OTHER)
            with torch.enable_grad():
                loss = self.loss_fn(self.model, batch)
            timeline.mark(None)
            timeline.watch_backward(loss)
            timeline.mark(OTHER)
            loss.backward()
            timeline.mark(OPTIMIZER)
            self.optimizer.step()
            timeline.mark(None)
        wait(self.device)
        return timeline.totals()

    def peak_bytes(self) -> int:
        """Peak of what is there at a time in one step, weights, momentum and batch too. Also warms up."""
        self.run(fresh(self.batch))  # makes the momentum
        stays = [*self.model.parameters(), *self.model.buffers(), *momentum_of(self.optimizer)]
        batch = fresh(self.batch)
        stays += [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        always = sum(tensor.nbytes for tensor in stays)
        if self.device.type == "cuda":
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.reset_peak_memory_stats(self.device)
            before = torch.cuda.memory_allocated(self.device)
            self.run(batch)
            return torch.cuda.max_memory_allocated(self.device) - before + always
        tracker = LiveBytes(stays)
        with tracker:
            self.run(batch)
        return tracker.peak + always


def momentum_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, torch.Tensor)]


def _cost(whole: list[float], by_layer: list[dict[str, float]], peak: int) -> StepCost:
    milliseconds = 1000 * statistics.median(whole)
    names = dict.fromkeys(name for times in by_layer for name in times if name not in (OPTIMIZER, OTHER))
    # The least: in the short time of a layer, what else the machine does weighs heavily, and only adds.
    layers = {name: min(times.get(name, 0.0) for times in by_layer) for name in (*names, OPTIMIZER, OTHER)}
    total = sum(layers.values())
    layers = {name: seconds / total * milliseconds for name, seconds in layers.items()}
    return StepCost(milliseconds, peak, layers, len(whole))


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@contextlib.contextmanager
def _own_rng(device: torch.device) -> Iterator[None]:
    """How often something is timed depends on how slow it is, and dropout draws every time."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds."""
    wait(device)
    begin = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - begin


def _clock(device: torch.device) -> tuple[Callable[[], Any], Callable[[Any, Any], float]]:
    """The time, and the seconds between two: on a GPU those of its stream, which lags behind."""
    if device.type != "cuda":
        return time.perf_counter, lambda begin, end: end - begin

    def now() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    return now, lambda begin, end: begin.elapsed_time(end) / 1000


def wait(device: torch.device) -> None:
    """Until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and that are still alive.

    Args:
        there_before: tensors that do not count; what is no tensor is left aside.
    """

    def __init__(self, there_before: list[Any]) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in there_before if isinstance(t, torch.Tensor)}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.count(result)
        return result

    def count(self, result: Any) -> None:
        """The tensors that an operator has returned."""
        for value in result if isinstance(result, (tuple, list)) else (result,):
            for tensor in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(tensor, torch.Tensor):
                    self._count(tensor.untyped_storage())

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.current += storage.nbytes()
        self.peak = max(self.peak, self.current)
        weakref.finalize(storage, self._release, key, storage.nbytes())

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.current -= size
