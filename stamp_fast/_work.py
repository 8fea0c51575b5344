"""One training step, or one forward, of a network that is cut for the time being: run, timed by operator, weighed."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from ._phases import in_mode
from .data import LossFn
from .graph._align import base_name
from .graph._plan import Plan, swapped
from .graph._record import call_model, fresh
from .graph._undisturbed import attributes_restored, uncompiled
from .report.measure import LiveBytes, momentum_of, timed, wait

if TYPE_CHECKING:
    from .graph import ChannelGraph

_CONTRACTIONS = {"convolution", "addmm", "mm", "bmm", "baddbmm"}
_ROUNDS, _MOST_ROUNDS = 3, 25
_SECONDS = 1.5  # of rounds beyond these
_UNNUMBERED = 2**64 - 1  # what accumulates gradients has this number


class Work:
    """A forward in eval mode, or where `loss_fn` is given a training step: forward, backward, SGD with momentum.

    It works on copies of what stays of the tensors; the model is as it was after each.
    """

    def __init__(self, plan: Plan, batch: Any, loss_fn: LossFn | None) -> None:
        self.plan, self.batch, self.loss_fn = plan, batch, loss_fn
        slots = plan.graph.slots
        trains = any(slot.is_parameter and slot.tensor.requires_grad for slot in slots)
        with torch.no_grad():
            live = plan.gather(list(range(len(slots))), [slot.tensor.detach().clone() for slot in slots])
        self.tensors: dict[int, torch.Tensor] = {}
        for i, (slot, tensor) in enumerate(zip(slots, live, strict=True)):
            # A wholly frozen network costs what it would cost if it were trained.
            learns = slot.tensor.requires_grad or (not trains and tensor.is_floating_point())
            self.tensors[i] = nn.Parameter(tensor, requires_grad=learns) if slot.is_parameter else tensor
        self._optimizer: torch.optim.Optimizer | None = None
        learned = [tensor for tensor in self.tensors.values() if tensor.requires_grad]
        if loss_fn is not None and learned:
            # Its work is that of any step; a loss of any scale stays finite.
            self._optimizer = torch.optim.SGD(learned, lr=0.0, momentum=0.9)

    def _there(self, batch: Any) -> list[torch.Tensor]:
        """What is there before and after a step: tensors of the model, momentum once it is made, the batch."""
        given = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
        made = momentum_of(self._optimizer) if self._optimizer is not None else []
        return [*self.tensors.values(), *made, *given]

    @contextlib.contextmanager
    def ready(self) -> Iterator[Callable[[Any], None]]:
        """Gives what does the work on a copy of the batch; while in here the model is the smaller one."""
        model, device = self.plan.graph.model, self.plan.graph.device
        devices = [device] if device.type == "cuda" else []
        with (
            attributes_restored(model),
            torch.random.fork_rng(devices),
            swapped(self.plan, self.tensors),
            in_mode(model, training=self.loss_fn is not None),
            uncompiled(),
        ):
            yield self._step if self.loss_fn is not None else self._forward

    def seconds(self) -> float:
        with self.ready() as work:
            return timed(functools.partial(work, fresh(self.batch)), self.plan.graph.device)

    def peak_bytes(self) -> int:
        """All that is alive at a time, tensors of the model, momentum and the batch too."""
        with self.ready() as work:
            work(fresh(self.batch))  # makes the momentum
            there = self._there(batch := fresh(self.batch))
            tracker = LiveBytes(there)
            with tracker:
                work(batch)
        return tracker.peak + sum(tensor.nbytes for tensor in there)

    def recorded(self) -> Recorded:
        """Of the first time momentum is made, and is not among what is there."""
        there = self._there(batch := fresh(self.batch))
        mode = Recorded(self.plan.graph.device, there)
        with self.ready() as work, mode:
            work(batch)
        mode.at_peak[-1] = mode.at_peak.get(-1, 0) + sum(tensor.nbytes for tensor in there)
        return mode

    def _forward(self, inputs: Any) -> None:
        with torch.no_grad():
            call_model(self.plan.graph.model, inputs)

    def _step(self, batch: Any) -> None:
        if self._optimizer is not None:
            self._optimizer.zero_grad(set_to_none=True)
        with torch.enable_grad():
            loss = self.loss_fn(self.plan.graph.model, batch)
            if loss.requires_grad:
                loss.backward()
        if self._optimizer is not None:
            self._optimizer.step()


def in_turns(graph: ChannelGraph, keeps: list[torch.Tensor], batch: Any, loss_fn: LossFn | None) -> list[float]:
    """Milliseconds of the networks' training steps, or forwards, timed in turns so that noise meets all alike.

    Medians of at least three times, of more while that takes no more than a second and a half.
    """
    works = [Work(graph.plan(keep), batch, loss_fn) for keep in keeps]
    for work in works:
        work.seconds()
    taken: list[list[float]] = [[] for _ in works]
    begin = time.perf_counter()
    while len(taken[0]) < _ROUNDS or (len(taken[0]) < _MOST_ROUNDS and time.perf_counter() - begin < _SECONDS):
        for work, times in zip(works, taken, strict=True):
            times.append(work.seconds())
    return [1000 * statistics.median(times) for times in taken]


@dataclasses.dataclass
class Operator:
    """One that a step has run.

    Attributes:
        args: tensors among them on the meta device.
        layer: index of the convolution or matrix product that it belongs to: itself, or the last before it; -1: none.
    """

    func: Any
    args: tuple
    kwargs: dict
    layer: int
    seconds: float


class Recorded(LiveBytes):
    """The operators of a step, each timed. Those of the backward belong to the layer whose forward they are of.

    Attributes:
        at_peak: by layer the bytes that it had made and that were alive when most was; -1: of no layer.
    """

    def __init__(self, device: torch.device, there_before: list[Any]) -> None:
        super().__init__(there_before)
        self.operators: list[Operator] = []
        self._device = device
        self._starts: list[int] = []  # of each layer the number of its node
        self._forward = True
        self._layer = -1
        self._alive: collections.Counter[int] = collections.Counter()  # bytes, by the layer that has made them
        self._made_by: dict[int, int] = {}
        self.at_peak: dict[int, int] = {}

    def _count(self, storage: torch.UntypedStorage) -> None:
        seen = storage._cdata in self._known
        super()._count(storage)
        if not seen:
            self._made_by[storage._cdata] = self._layer
            self._alive[self._layer] += storage.nbytes()
            if self.current == self.peak:
                self.at_peak = dict(self._alive)

    def _release(self, key: int, size: int) -> None:
        self._alive[self._made_by.pop(key)] -= size
        super()._release(key, size)

    @property
    def layers(self) -> int:
        """Convolutions and matrix products in the forward."""
        return len(self._starts)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._layer = layer = self._layer_of(base_name(str(func)))
        shapes = tree_map(lambda v: torch.empty_like(v, device="meta") if isinstance(v, torch.Tensor) else v, args)
        wait(self._device)
        begin = time.perf_counter()
        result = func(*args, **kwargs)
        wait(self._device)
        seconds = time.perf_counter() - begin
        self.count(result)
        self.operators.append(Operator(func, shapes, kwargs, layer, seconds))
        return result

    def _layer_of(self, name: str) -> int:
        node = torch._C._current_autograd_node()
        if node is not None:
            self._forward = False
            number = node._sequence_nr()
            return -1 if number == _UNNUMBERED else bisect.bisect_right(self._starts, number) - 1
        if not self._forward:  # the optimizer's
            return -1
        if name in _CONTRACTIONS:
            # An operator's node is made, and numbered, before the operator is dispatched to here.
            self._starts.append(torch.autograd._get_sequence_nr() - 1)
        return len(self._starts) - 1
