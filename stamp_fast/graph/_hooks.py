"""Forward hooks during a trace. They run, since they may be part of what the model computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import StampFastError, TraceError

_CURE = "take it off (`handle.remove()`) while pruning and register it again afterwards"


class WatchedHooks:
    """Makes every forward hook that cannot work on meta tensors, or keeps some, an error that names it.

    Args:
        modules: get wrappers in the place of their hooks; the caller puts their tables of hooks back.
        made: the tensors of the trace, oldest first: parameters and buffers now, more as the trace goes on.
        calls_done: how many operators ran so far.
    """

    def __init__(self, modules: dict[str, nn.Module], made: list[torch.Tensor], calls_done: Callable[[], int]) -> None:
        self._made = made
        self._parameters = {id(t) for t in made}
        self._calls_done = calls_done
        self._seen: dict[str, list[weakref.ref]] = {}
        for name, module in modules.items():
            for kind, table in (
                ("forward pre-hook", module._forward_pre_hooks),
                ("forward hook", module._forward_hooks),
            ):
                for key, hook in table.items():
                    table[key] = self._watched(hook, f"the {kind} {_described(hook)} of module '{name}'")

    def _watched(self, hook: Callable, what: str) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            first = len(self._made)
            try:
                result = hook(*args, **kwargs)
            except StampFastError:  # of the trace itself
                raise
            except Exception as error:
                raise TraceError(
                    f"trace: {what} failed on meta tensors, which have shapes but no values: {type(error).__name__}: "
                    f"{error}. If it only looks on, {_CURE}",
                    self._calls_done(),
                ) from error
            seen = [v for v in tree_leaves((args[1:], kwargs)) if isinstance(v, torch.Tensor)] + self._made[first:]
            new = [weakref.ref(t) for t in seen if t.device.type == "meta" and id(t) not in self._parameters]
            self._seen.setdefault(what, []).extend(new)
            return result

        return call

    def check_nothing_kept(self) -> None:
        """To be called when the trace has let go of its tensors.

        Raises:
            TraceError: a tensor that a hook has seen lives on.
        """
        self._made = []
        if not any(tensor() is not None for seen in self._seen.values() for tensor in seen):
            return
        gc.collect()
        for what, seen in self._seen.items():
            if any(tensor() is not None for tensor in seen):
                raise TraceError(f"trace: {what} keeps tensors of the trace, which have no values; {_CURE}")


def _described(hook: Any) -> str:
    code = getattr(hook, "__code__", None)
    if code is None:
        return type(hook).__name__
    return f"{hook.__name__} ({code.co_filename}:{code.co_firstlineno})"
