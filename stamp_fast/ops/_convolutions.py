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
        found = _convolved(*args, **kwargs) if func is torch.conv2d else None
        return func(*args, **kwargs) if found is None else found


def _convolved(
    input: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups: int = 1
) -> Tensor | None:
    """What `torch.conv2d` gives for these arguments, from Triton; None where there is no kernel for them."""
    if input.ndim != 4 or isinstance(padding, str) or input.device.type == "meta":
        return None
    if choose("masked_conv2d", input, None, has_triton=groups == 1) != "triton":
        return None
    moves = [v[0] if isinstance(v, (tuple, list)) and len(v) == 1 else v for v in (stride, padding, dilation)]
    return masked_conv2d(input, weight, bias, stride=moves[0], padding=moves[1], dilation=moves[2])
