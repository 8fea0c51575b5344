"""Fresh BatchNorm statistics for a network whose channels have changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def recalibrate(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> int:
    """Replaces running means and variances by their average over `batches`; returns how many layers have them.

    Only layers that track statistics are in training mode meanwhile; every flag and momentum is put back.
    """
    norms = [m for m in model.modules() if isinstance(m, _NormBase) and m.track_running_stats]
    if not norms:
        return 0
    flags = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.training = True
        with torch.no_grad():
            for batch in batches:
                forward(model, batch)
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in flags:
            module.training = training
    return len(norms)
