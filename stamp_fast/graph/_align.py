"""Runs a forward in step with its recording: which recorded call is the operator that runs now?"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import LoaderError, StampFastError, TraceError
from ._record import Ref, evaluate

if TYPE_CHECKING:
    from .graph import ChannelGraph

# Operators that only look at memory differently: a slice of everything is an alias, a copy of something contiguous
# is nothing, so they come and go with sizes and devices.
VIEWS = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "_reshape_alias", "t", "transpose", "permute", "expand"),
        *("slice", "select", "split", "split_with_sizes", "unsafe_split", "unbind", "unsqueeze", "squeeze"),
        *("alias", "detach", "clone", "contiguous", "_to_copy", "as_strided", "as_strided_", "lift_fresh"),
    )
)


@functools.cache
def base_name(name: str) -> str:
    """ "aten.add_.Tensor" -> "add_"."""
    return name.split(".")[1]


class Aligned(TorchDispatchMode):
    """Hands every operator that is not a view to `on_call`, with the index of the recorded call that it is.

    Operators are counted module by module: what a module does with values (the boxes of a detector) may differ from
    the recording, as long as no call in `needed` is left there. A module that runs once more than was recorded (for
    every image of a list) begins anew. Modules in `apart` are not looked at.

    Raises:
        TraceError: a module runs another operator than was recorded, where that matters.
    """

    def __init__(self, graph: ChannelGraph, needed: set[int], apart: Collection[str] = ()) -> None:
        super().__init__()
        self.graph = graph
        self.running: list[str] = []  # names of the modules that run now, the innermost last
        self._calls = graph.recording.calls[: graph.recording.costed]
        self._needed = needed
        self._ran: set[int] = set()
        self._waits_for_add = False
        self._expected: dict[str, list[int]] = {}
        for i in reversed(range(len(self._calls))):
            if base_name(self._calls[i].name) not in VIEWS and self._calls[i].module not in apart:
                self._expected.setdefault(self._calls[i].module, []).append(i)
        self._whole = {module: list(calls) for module, calls in self._expected.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if base_name(name) in VIEWS:
            return func(*args, **kwargs)
        module = self.running[-1] if self.running else ""
        expected = self._expected.get(module, [])
        called = base_name(name)
        if not expected and (whole := self._whole.get(module)) and self._begins(whole, called):
            expected += whole
        recorded = [base_name(self._calls[op].name) for op in expected[: -3 if len(expected) > 1 else None : -1]]
        if called == "add" and self._waits_for_add:
            self._waits_for_add = False
            return func(*args, **kwargs)
        # A linear layer is addmm, or mm and add, as the layout of its input has it.
        if called == "mm" and recorded[:1] == ["addmm"]:
            self._waits_for_add = True
            return self.on_call(self._next(expected), func, args, kwargs, shift=1)
        if called == "addmm" and recorded == ["mm", "add"]:
            op = self._next(expected)
            self._next(expected)
            return self.on_call(op, func, args, kwargs, shift=-1)
        if not expected or not _same_operator(self._calls[expected[-1]].name, name):
            missed = sorted(self._needed.intersection(expected) - self._ran)
            if missed:
                raise TraceError(f"the forward runs {name} where its recording has {self._calls[expected[-1]]}")
            expected.clear()
            return func(*args, **kwargs)
        return self.on_call(self._next(expected), func, args, kwargs)

    def _next(self, expected: list[int]) -> int:
        op = expected.pop()
        self._ran.add(op)
        return op

    def _begins(self, whole: list[int], called: str) -> bool:
        """Whether a module that has run as it was recorded may be running once more."""
        first = base_name(self._calls[whole[-1]].name)
        return self._ran.issuperset(whole) and (called == first or {called, first} == {"mm", "addmm"})

    def run(self, inputs: Any, grad: bool = False) -> Any:
        """One forward in eval mode; its output.

        Raises:
            LoaderError: the model cannot take these inputs.
        """
        try:
            return evaluate(self.graph.model, inputs, self, grad)
        except StampFastError:
            raise
        except Exception as error:
            raise LoaderError(
                f"loader: the model cannot take the inputs of one of its batches: {type(error).__name__}: {error}"
            ) from error

    def missed(self) -> list[int]:
        """Recorded calls that matter but were not run."""
        expected = {op for calls in self._expected.values() for op in calls}
        return sorted(self._needed.intersection(expected) - self._ran)

    def labelled(self, op: int, args: tuple, shift: int) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Activations among the arguments that `on_call` was given, with each dim that has labels and its axis."""
        recorded = self.graph.recording.calls[op].args[max(0, shift) :]
        for ref, value in zip(recorded, args[max(0, -shift) :], strict=False):
            if isinstance(ref, Ref) and self.graph.is_activation(ref):
                for dim in range(value.dim()):
                    axis = self.graph._core.axis_of(ref, dim)
                    if axis >= 0:
                        yield value, dim, axis

    def on_call(self, op: int, func, args: tuple, kwargs: dict, shift: int = 0):
        """`args[i]` is argument `i + shift` of the recorded call."""
        raise NotImplementedError


def _same_operator(recorded: str, called: str) -> bool:
    # Each device has its own batch norm operator.
    return recorded == called or ("batch_norm" in recorded and "batch_norm" in called)
