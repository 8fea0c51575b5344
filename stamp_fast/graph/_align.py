"""Runs a forward in step with its recording: which recorded call is the operator that runs now?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import TraceError

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


def base_name(name: str) -> str:
    """ "aten.add_.Tensor" -> "add_"."""
    return name.split(".")[1]


class Aligned(TorchDispatchMode):
    """Hands every operator that is not a view to `on_call`, with the index of the recorded call that it is.

    Raises:
        TraceError: the forward runs another operator than was recorded.
    """

    def __init__(self, graph: ChannelGraph) -> None:
        super().__init__()
        self.graph = graph
        calls = graph.recording.calls[: graph.recording.costed]
        self._expected = iter([i for i, call in enumerate(calls) if base_name(call.name) not in VIEWS])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = str(func)
        if base_name(name) in VIEWS:
            return func(*args, **kwargs)
        op = next(self._expected, None)
        recorded = self.graph.recording.calls[op].name if op is not None else "nothing more"
        if not _same_operator(recorded, name):
            raise TraceError(f"the forward runs {name} where its recording has {recorded}")
        return self.on_call(op, func, args, kwargs)

    def on_call(self, op: int, func, args: tuple, kwargs: dict):
        raise NotImplementedError


def _same_operator(recorded: str, called: str) -> bool:
    # Each device has its own batch norm operator.
    return recorded == called or ("batch_norm" in recorded and "batch_norm" in called)
