"""Lets a model's own convolutions run on Triton while it runs virtually compacted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import config
from ._backend import choose
from .masked_conv2d import masked_conv2d


def convolutions() -> AbstractContextManager:
    """Inside, `torch.conv2d` is `masked_conv2d` where `config.backend` asks for Triton and there is a kernel.

    Its weights are packed by then: packing all of a network's in one call is cheaper than gathering in every kernel.
    """
    return _OnTriton() if config.backend == "triton" else nullcontext()


class _OnTriton(TorchFunctionMode):
    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.conv2d:
            arguments = _Arguments(*args, **kwargs)
            if arguments.fit():
                return arguments.run()
        return func(*args, **kwargs)


class _Arguments:
    """Of `torch.conv2d`."""

    def __init__(self, input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1) -> None:
        self.tensors = input, weight, bias
        self.moves = {"stride": stride, "padding": padding, "dilation": dilation}
        self.groups = groups

    def fit(self) -> bool:
        input = self.tensors[0]
        if input.ndim != 4 or isinstance(self.moves["padding"], str) or input.device.type == "meta":
            return False
        return choose("masked_conv2d", input, None, has_triton=self.groups == 1) == "triton"

    def run(self) -> Tensor:
        moves = {name: v[0] if isinstance(v, (tuple, list)) and len(v) == 1 else v for name, v in self.moves.items()}
        return masked_conv2d(*self.tensors, **moves)
