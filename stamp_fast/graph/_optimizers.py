"""Optimizers that are handed in, and which of their state belongs to which parameter."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..errors import ArgumentError

Optimizers: TypeAlias = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None


def listed(optimizer: Any) -> list[torch.optim.Optimizer]:
    """The optimizers that were handed in: none, one, or several (Muon takes matrices only, and wants a second).

    Raises:
        ArgumentError: something else is among them.
    """
    if optimizer is None:
        return []
    found = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    for one in found:
        if not isinstance(one, torch.optim.Optimizer):
            raise ArgumentError(f"optimizer: expected a torch.optim.Optimizer or several, got {type(one).__name__}")
        if isinstance(getattr(one, "optim", None), torch.optim.Optimizer):
            raise ArgumentError(
                f"optimizer: {type(one).__name__} shards its state over processes, so that it cannot be cut; use an "
                "ordinary optimizer"
            )
    return found


def state_by_parameter(
    model: nn.Module, optimizer: Optimizers
) -> dict[int, list[tuple[MutableMapping[str, Any], str]]]:
    """Per parameter, by id, the pieces of optimizer state that are cut with it: (state, key).

    State of parameters that keep their shape is looked at, too: L-BFGS keeps all of its under the first parameter.

    Raises:
        ArgumentError: an optimizer holds none of the model's parameters (but copies of them, or another model's), or
            some state is neither shaped like its parameter nor a single number.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[int, list] = {}
    for one in listed(optimizer):
        kind = type(one).__name__
        if not any(id(p) in names for group in one.param_groups for p in group["params"]):
            raise ArgumentError(
                f"optimizer: holds none of the model's parameters ({kind}); make it from model.parameters()"
            )
        for owner, state in one.state.items():
            if not isinstance(owner, torch.Tensor) or not isinstance(state, MutableMapping):
                continue
            for key, value in state.items():
                name = names.get(id(owner), "a parameter of no module")
                if _follows(value, owner, f"{kind} keeps '{key}' under '{name}', which"):
                    found.setdefault(id(owner), []).append((state, key))
    return found


def _follows(value: Any, owner: torch.Tensor, what: str) -> bool:
    """Whether a piece of state is cut with its parameter: along every dim where it has the same size."""
    if not any(isinstance(leaf, torch.Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
        return False
    if isinstance(value, torch.Tensor) and value.dim() == owner.dim():
        sizes = zip(value.shape, owner.shape, strict=True)
        if all(mine in (1, theirs) for mine, theirs in sizes):
            return True
    raise ArgumentError(
        f"optimizer: {what} is not shaped like that parameter, so it cannot be cut with it; prune without optimizer= "
        "and make a new optimizer afterwards"
    )
