"""Checks of what the user hands to `prune`, before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .budget import Budget, check_round_to, minimum_width
from .errors import ArgumentError, ModelError
from .graph import ChannelGraph
from .graph._optimizers import listed


def check_arguments(
    budget: Any,
    method: Any,
    methods: Iterable[str],
    steps: Any,
    round_to: Any,
    keep: Any,
    optimizer: Any,
    seed: Any,
    loss_fn: Any,
    switches: dict[str, Any],
) -> None:
    if not isinstance(budget, Budget):
        raise ArgumentError(f"budget: expected a Budget, e.g. Budget(macs=0.5), got {budget!r}")
    if not callable(method) and (not isinstance(method, str) or method not in methods):
        raise ArgumentError(f"method: must be one of {', '.join(methods)}, or a function, got {method!r}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ArgumentError(f"steps: must be a whole number, got {steps!r}")
    check_round_to(round_to)
    if not isinstance(keep, (list, tuple, set, frozenset)) or not all(isinstance(name, str) for name in keep):
        raise ArgumentError(f"keep: expected a list of module or parameter names, got {keep!r}")
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63):
        raise ArgumentError(f"seed: must be a whole number from 0 to 2**63 - 1, or None, got {seed!r}")
    if loss_fn is not None and not callable(loss_fn):
        raise ArgumentError(f"loss_fn: expected a function (model, batch) -> loss, got {loss_fn!r}")
    for name, value in switches.items():
        if not isinstance(value, bool):
            raise ArgumentError(f"{name}: must be True or False, got {value!r}")
    if torch.is_inference_mode_enabled():
        raise ArgumentError("prune: cannot learn anything in torch.inference_mode(); call it outside")
    listed(optimizer)


def check_model(model: nn.Module) -> torch.device:
    """Returns the one device of the model.

    Raises:
        ModelError: no parameters; some on meta, on several devices or of inference mode; NaN or inf in one or in a
            buffer.
    """
    homes: dict[torch.device, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        homes.setdefault(tensor.device, name)
    if not any(True for _ in model.parameters()):
        raise ModelError(f"model: {type(model).__name__} has no parameters, so there is nothing to prune")
    if len(homes) > 1:
        where = ", ".join(f"'{name}' on {device}" for device, name in homes.items())
        raise ModelError(f"model: lies on several devices ({where}); move it to one with model.to(device)")
    device = next(iter(homes))
    if device.type == "meta":
        raise ModelError("model: lies on the meta device and has no values; load its weights first")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_inference():
            raise ModelError(f"model: '{name}' was made in torch.inference_mode(); build the model outside of it")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"model: '{name}' holds NaN or inf; load sound weights before pruning")
    return device


def check_prunable(graph: ChannelGraph) -> None:
    """Raises ModelError where no group is left to prune, with the reasons."""
    if any(group.num_classes > 1 for group in graph.prunable):
        return
    reasons = [
        f"'{g.name}': {g.reason or minimum_width(g, None)}" for g in graph.groups + graph.frozen + graph.unlisted()
    ]
    raise ModelError("model: nothing to prune. " + ("; ".join(reasons[:8]) or "No layer with channels was found."))
