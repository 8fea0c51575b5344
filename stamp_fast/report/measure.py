"""Time and peak memory of a training step, measured."""

from __future__ import annotations

import dataclasses
import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ROUNDS = 5
_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class StepCost:
    """One training step (forward, backward, SGD step): median milliseconds, and peak bytes allocated during it."""

    milliseconds: float
    peak_bytes: int


def compare_steps(
    models: list[nn.Module],
    batch: Any,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    seconds: float = _SECONDS,
) -> list[StepCost]:
    """Costs of the models' training steps on one batch, timed in turns so that noise meets all alike.

    The models are trained in place: hand in copies. At least one timed step each, at most five, about `seconds` in all.
    """
    steps = [_step_of(model, batch, loss_fn) for model in models]
    peaks = [_peak_bytes(model, step, batch) for model, step in zip(models, steps, strict=True)]
    times: list[list[float]] = [[] for _ in steps]
    begin = time.perf_counter()
    for _ in range(_ROUNDS):
        for step, taken in zip(steps, times, strict=True):
            taken.append(_timed(step))
        if time.perf_counter() - begin > seconds:
            break
    return [StepCost(1000 * statistics.median(t), peak) for t, peak in zip(times, peaks, strict=True)]


def _step_of(model: nn.Module, batch: Any, loss_fn: Callable) -> Callable[[], None]:
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:  # a wholly frozen network costs what it would cost if it were trained
        trainable = [p.requires_grad_() for p in model.parameters() if p.is_floating_point()]
    optimizer = torch.optim.SGD(trainable, lr=0.0, momentum=0.9)  # the work of a step; a loss of any scale stays finite

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss_fn(model, batch).backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None]) -> float:
    _synchronize()
    begin = time.perf_counter()
    step()
    _synchronize()
    return time.perf_counter() - begin


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _peak_bytes(model: nn.Module, step: Callable[[], None], batch: Any) -> int:
    """Peak of what one step has allocated at a time, beyond what was there before it. Also warms up."""
    tensors = [t for t in tree_leaves(batch) if isinstance(t, torch.Tensor)]
    if tensors and tensors[0].is_cuda:
        step()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    tracker = LiveBytes([*model.parameters(), *model.buffers(), *tensors])
    with tracker:
        step()
    return tracker.peak


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators have made and that are still alive."""

    def __init__(self, there_before: list[torch.Tensor]) -> None:
        super().__init__()
        self.current = 0
        self.peak = 0
        self._known = {t.untyped_storage()._cdata for t in there_before}

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
