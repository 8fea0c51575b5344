"""Fresh BatchNorm statistics for a network whose channels have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ._phases import in_mode


def recalibrate(
    model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any], training: bool = False
) -> int:
    """Replaces running means and variances by their average over `batches`; returns how many layers have them.

    Left alone: layers that the forward does not reach, and layers that the user has put in eval mode inside a model in
    training mode. Every flag, momentum and batch counter is put back.

    Args:
        training: the mode of all layers that are not worked on, for a `forward` that runs in training mode only.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, _NormBase) and m.track_running_stats and (m.training or not model.training)
    ]
    if not norms:
        return 0
    before = [
        (norm, norm.momentum, {k: b.clone() for k, b in norm._buffers.items() if b is not None}) for norm in norms
    ]
    with in_mode(model, training), torch.no_grad():
        try:
            for module in model.modules():
                module.training = module.training and not isinstance(module, _NormBase)
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # cumulative average
                norm.training = True
            for batch in batches:
                forward(model, batch)
        finally:
            for norm, momentum, buffers in before:
                norm.momentum = momentum
                reached = bool(norm.num_batches_tracked > 0)
                for name, buffer in buffers.items():
                    if not reached or name == "num_batches_tracked":
                        norm._buffers[name].copy_(buffer)
    return len(norms)
