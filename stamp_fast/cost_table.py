"""What a network of any widths costs on this machine, from measured times of its operators."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import platform
import random
import statistics
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ._files import JsonLines
from ._processes import Processes
from .errors import ArgumentError
from .graph._align import VIEWS, base_name
from .graph._plan import swapped
from .graph._record import call_model, fresh
from .graph._undisturbed import undisturbed
from .report.measure import timed

if TYPE_CHECKING:
    from .graph import ChannelGraph

_REPEATS = 15
_LEAST = 3  # of these, however long they take: another program may be at work
_SECONDS = 0.02  # at most, for more of one operator
_FREE = VIEWS | {"empty", "empty_like", "is_same_size", "sym_size"}
_FITTED = 6  # networks that are measured whole


class CostTable:
    """Look-up table of operator times by size; a network's latency is their sum, fitted to a few measured networks.

    What is not in it yet is measured when it is first asked for. The sum leaves out what lies between operators, and
    each operator is measured with warm caches; so a line through the times of a few whole networks is laid over it.

    Args:
        graph: of the widest network; `graph.cost_table` is to be this.
        inputs: of a forward, of the batch size that counts.
        path: a file of JSON lines that times are read from, and written to as they are measured; those of another
            machine, torch or number of threads are not used. Under torch.distributed the first process writes.

    Attributes:
        error: largest relative difference between a fitted and a measured time, over the networks measured whole.
    """

    def __init__(self, graph: ChannelGraph, inputs: Any, *, path: Any = None, seed: int = 0) -> None:
        self.graph, self.inputs = graph, inputs
        if not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(inputs)):
            raise ArgumentError("inputs: expected what a forward takes, a tensor, or a tuple or dict with some")
        self._file = JsonLines(path, "CostTable: {} is not a table of costs")
        self._sums: dict[bytes, float] = {}
        self._sizes: _Sizes | None = None
        self._runs = 0  # on the meta device, for a sum
        self._machine = machine_of(graph.device)
        self._seconds: dict[str, float] = {}
        self._fits: dict[str, list[float]] = {}  # slope, offset, error of every network
        self._read()
        whole = " ".join(f"{func} {sizes_of(args)}" for func, args, _ in self._calls(graph.all_kept()))
        self._network = hashlib.sha256(whole.encode()).hexdigest()
        if self._network not in self._fits:
            self._fits[self._network] = self._fit(random.Random(seed))
            self._write({"fit": self._network, "values": self._fits[self._network]})
        self._slope, self._offset, self.error = self._fits[self._network]

    def latency(self, keep: torch.Tensor) -> float:
        """Milliseconds of a forward in eval mode.

        Args:
            keep: bool, [num_classes].
        """
        return 1000 * max(0.0, self._offset + self._slope * self._sum(keep))

    def measured(self, *keeps: torch.Tensor, rounds: int = 9) -> list[float]:
        """Milliseconds of a forward of the whole networks, timed in turns; medians."""
        plans = [self.graph.plan(keep) for keep in keeps]
        taken: list[list[float]] = [[] for _ in plans]
        for _ in range(rounds):
            for plan, times in zip(plans, taken, strict=True):
                with self.graph.masked(plan) as model, undisturbed(model), torch.no_grad():
                    model.eval()
                    work = functools.partial(call_model, model, fresh(self.inputs))
                    times += _times(work, self.graph.device, repeats=1)
        return [1000 * statistics.median(times) for times in taken]

    def _read(self) -> None:
        try:
            for line in self._file.read():
                if line["machine"] == self._machine and "fit" in line:
                    self._fits.setdefault(line["fit"], [float(value) for value in line["values"]])
                elif line["machine"] == self._machine:
                    self._seconds.setdefault(line["op"], float(line["seconds"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self._file.unfit(error) from error

    def _write(self, line: dict[str, Any]) -> None:
        if Processes().is_first:
            self._file.append(line | {"machine": self._machine})

    def _fit(self, draw: random.Random) -> list[float]:
        keeps = [self.graph.all_kept()]
        for trial in range(_FITTED):
            keep = self.graph.all_kept()
            for group in self.graph.prunable:
                least = 0.1 + 0.8 * trial / _FITTED  # from narrow networks to wide ones
                share = draw.uniform(least, min(1.0, least + 0.3))
                keep[group.classes.start + max(1, round(share * group.num_classes)) : group.classes.stop] = False
            keeps.append(keep)
        sums = torch.tensor([self._sum(keep) for keep in keeps], dtype=torch.float64)
        times = torch.tensor(self.measured(*keeps), dtype=torch.float64) / 1000
        # Relative errors count: a millisecond is more to a small network.
        rows = torch.stack([sums, torch.ones_like(sums)], 1) / times[:, None]
        slope, offset = torch.linalg.lstsq(rows, torch.ones_like(times)[:, None]).solution.flatten().tolist()
        if not slope > 0:
            warnings.warn(
                "CostTable: the time of this network does not grow with its operators': it waits for something else, "
                "and budgets in time cannot choose between widths",
                stacklevel=4,
            )
            slope, offset = (times / sums).mean().item(), 0.0
        error = ((offset + slope * sums) / times - 1).abs().max().item()
        return [slope, offset, error]

    def _sum(self, keep: torch.Tensor) -> float:
        key = keep.numpy().tobytes()
        if key not in self._sums:
            if self._sizes is None:
                self._sums[key] = sum(self._of(*call) for call in self._calls(keep))
                self._runs += 1
                if self._runs == len(self.graph.prunable) + _FITTED:  # many are asked for: worth as many runs more
                    self._sizes = _Sizes.learnt(self.graph, self._calls)
            else:
                self._sums[key] = self._sizes.summed(keep, self._of)
        return self._sums[key]

    def _calls(self, keep: torch.Tensor) -> list[tuple]:
        """Operators of a forward of the network of these widths, with meta tensors for arguments."""
        plan = self.graph.plan(keep)
        small: dict[int, torch.Tensor] = {}
        for i, slot in enumerate(self.graph.slots):
            shape, tensor = plan.shape(i), slot.tensor
            channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
            empty = torch.empty(shape, dtype=tensor.dtype, device="meta")
            empty = empty.contiguous(memory_format=torch.channels_last) if channels_last else empty
            small[i] = nn.Parameter(empty, requires_grad=False) if slot.is_parameter else empty
        inputs = tree_map(lambda v: _like(v, "meta") if isinstance(v, torch.Tensor) else v, self.inputs)
        seen = _Calls()
        with undisturbed(self.graph.model), swapped(plan, small), torch.no_grad(), seen:
            self.graph.model.eval()
            call_model(self.graph.model, inputs)
        return seen.calls

    def _of(self, func: Callable, args: tuple, kwargs: dict) -> float:
        """Seconds of one operator."""
        key = _written((func, args, kwargs))
        if key not in self._seconds:
            device = self.graph.device
            args, kwargs = tree_map(lambda v: _filled(v, device) if isinstance(v, torch.Tensor) else v, (args, kwargs))
            if "device" in kwargs:
                kwargs["device"] = device
            # The least: what else the machine does only adds, and what is systematic the fit takes up.
            self._seconds[key] = min(_times(lambda: func(*args, **kwargs), device))
            self._write({"op": key, "seconds": self._seconds[key]})
        return self._seconds[key]


class _Sizes:
    """The operators of a network of any widths without running it: all their sizes are affine in the groups' widths.

    Running the network on the meta device takes a hundred times as long, and a search asks for thousands.

    Args:
        calls: of the widest network.
        sizes: float64, [ints of all calls], of the widest network.
        slopes: float64, [ints of all calls, groups], what one class of a group adds.
    """

    def __init__(self, graph: ChannelGraph, calls: list[tuple], sizes: torch.Tensor, slopes: torch.Tensor) -> None:
        self._graph, self._calls, self._whole, self._slopes = graph, calls, sizes, slopes
        self._parts = [len(_ints(call)) for call in calls]
        self._known: dict[tuple[int, bytes], float] = {}

    @staticmethod
    def learnt(graph: ChannelGraph, calls_of: Callable[[torch.Tensor], list[tuple]]) -> _Sizes | None:
        """From a run for each group, held to runs at random; None where the sizes are not affine."""
        whole = calls_of(graph.all_kept())
        base = _all_ints(whole)
        slopes = torch.zeros(len(base), len(graph.prunable), dtype=torch.float64)
        for number, group in enumerate(graph.prunable):
            if group.num_classes > 1:
                keep = graph.all_kept()
                keep[group.classes.start + group.num_classes // 2 : group.classes.stop] = False
                sizes = _all_ints(calls_of(keep))
                if sizes.shape != base.shape:
                    return None
                slopes[:, number] = (base - sizes) / (group.num_classes - group.num_classes // 2)
        found = _Sizes(graph, whole, base, slopes)
        draw = torch.Generator().manual_seed(0)
        for _ in range(3):
            keep = torch.rand(graph.num_classes, generator=draw) < torch.rand((), generator=draw)
            for group in graph.groups:
                keep[group.classes.start] = True
                keep[group.classes] |= group.reason is not None
            real = calls_of(keep)
            if not torch.equal(found._all(keep).double(), _all_ints(real)):
                return None
            if [_laid_out(call) for call in found.at(keep)] != [_laid_out(call) for call in real]:
                return None
        return found

    def at(self, keep: torch.Tensor) -> list[tuple]:
        """The operators, with meta tensors for arguments."""
        return [_resized(call, part) for call, part in zip(self._calls, self._split(keep), strict=True)]

    def summed(self, keep: torch.Tensor, seconds_of: Callable[..., float]) -> float:
        """Of all operators."""
        total = 0.0
        for number, part in enumerate(self._split(keep)):
            key = number, part.numpy().tobytes()
            if key not in self._known:
                self._known[key] = seconds_of(*_resized(self._calls[number], part))
            total += self._known[key]
        return total

    def _split(self, keep: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self._all(keep).split(self._parts)

    def _all(self, keep: torch.Tensor) -> torch.Tensor:
        gone = torch.tensor([g.num_classes - int(keep[g.classes].sum()) for g in self._graph.prunable])
        return (self._whole - self._slopes @ gone.double()).round().long()


def _ints(call: tuple) -> list[int]:
    """All that can change with a width: sizes of tensors, and integers."""
    found: list[int] = []
    for leaf in tree_leaves(call[1:]):
        if isinstance(leaf, torch.Tensor):
            found += leaf.shape
        elif isinstance(leaf, int) and not isinstance(leaf, bool):
            found.append(leaf)
    return found


def _all_ints(calls: list[tuple]) -> torch.Tensor:
    return torch.tensor([value for call in calls for value in _ints(call)], dtype=torch.float64)


def _resized(call: tuple, sizes: torch.Tensor) -> tuple:
    """The operator with these in the place of its own `_ints`."""
    left = iter(sizes.tolist())

    def other(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            order = sorted(range(leaf.dim()), key=lambda dim: -leaf.stride(dim))
            return torch.empty_permuted([next(left) for _ in order], order, dtype=leaf.dtype, device="meta")
        return next(left) if isinstance(leaf, int) and not isinstance(leaf, bool) else leaf

    return (call[0], *tree_map(other, call[1:]))


def _laid_out(call: tuple) -> tuple:
    """What tells operators apart: the stride of a dim of size 1 does not."""
    leaves = [
        (leaf.shape, [s for s, size in zip(leaf.stride(), leaf.shape, strict=True) if size > 1], leaf.dtype)
        if isinstance(leaf, torch.Tensor)
        else leaf
        for leaf in tree_leaves(call[1:])
    ]
    return call[0], leaves


def _written(call: tuple) -> str:
    func, args, kwargs = call
    return f"{func} {sizes_of(args)} {sizes_of(kwargs)}"


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if base_name(str(func)) not in _FREE:
            self.calls.append(
                (func, *tree_map(lambda v: v.detach() if isinstance(v, torch.Tensor) else v, (args, kwargs)))
            )
        return func(*args, **kwargs)


def sizes_of(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype)[6:]}{list(value.shape)}{list(value.stride())}"
    if isinstance(value, (list, tuple)):
        return "(" + " ".join(map(sizes_of, value)) + ")"
    if isinstance(value, dict):
        return " ".join(f"{name}={sizes_of(item)}" for name, item in value.items())
    return str(value)


def _like(tensor: torch.Tensor, device: Any) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)


def _filled(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    # As strided views of flat memory: elements of an expanded tensor share theirs, and cannot be written to.
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = torch.zeros(last + 1 if tensor.numel() else 0, dtype=tensor.dtype, device=device)
    if flat.is_floating_point():
        flat.uniform_(0.5, 1.5, generator=torch.Generator(device).manual_seed(0))
    return flat.as_strided(tensor.shape, tensor.stride())


@torch.no_grad()
def _times(work: Callable[[], Any], device: torch.device, repeats: int = _REPEATS) -> list[float]:
    """Seconds, after a first time that does not count."""
    work()
    taken: list[float] = []
    while len(taken) < repeats and (len(taken) < _LEAST or sum(taken) < _SECONDS):
        taken.append(timed(work, device))
    return taken


@functools.cache
def _cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def machine_of(device: torch.device) -> dict[str, Any]:
    """What times depend on."""
    on_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if on_gpu else f"{_cpu()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads()}
