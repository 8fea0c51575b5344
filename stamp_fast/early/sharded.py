"""Early pruning of a network that `fully_shard` (FSDP2) has spread over processes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import ArgumentError, ModelError
from .early_pruner import EarlyPruner


class ShardedEarlyPruner:
    """`EarlyPruner` for FSDP2, whose parameters cannot change their shape: the cut gives a new model.

    A whole copy of the network is watched and cut in every process (in the CPU's memory), and sharded anew. The
    optimizer stays the same object, its state cut and sharded along, so that schedules go on::

        pruner = ShardedEarlyPruner(model, optimizer, images[:2], make=Net, shard=shard, cap=10)
        for epoch in range(epochs):
            for batch in loader:
                loss(model, batch).backward()
                pruner.observe()
                optimizer.step()
                optimizer.zero_grad()
            if pruner.epoch_end():
                model = pruner.model

    All processes call all of it. Buffers are those of each process, as FSDP2 has them.

    Args:
        model: sharded as `shard` does it. To resume, the dense one again, with `state` among the options: where that is
            from after the cut, the attribute `model` is cut as it was; its state, and the optimizer's, are loaded next.
        optimizer: one, of the model's parameters.
        example: what a forward takes, on the CPU.
        make: makes the dense network, unsharded, on the CPU; its weights do not matter.
        shard: takes an unsharded network on the CPU, shards it (and moves it to its device) and returns it.
        options: of `EarlyPruner`; not `ema`.

    Attributes:
        model: sharded; another object after a cut.
        pruner: the `EarlyPruner` of the whole copy.

    Raises:
        ArgumentError: `make` gives another network than `model`, or an option that is not for sharded models.
        ModelError: the model is not sharded, or `shard` does not shard.
        StampFastError: what `EarlyPruner` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        example: Any,
        *,
        make: Callable[[], nn.Module],
        shard: Callable[[nn.Module], nn.Module],
        **options: Any,
    ) -> None:
        if "ema" in options:
            raise ArgumentError("ema: averages of a sharded model cannot be cut along; make a new one after the cut")
        _check_sharded(
            model, "model: is not sharded, or not all of it; use EarlyPruner, or fully_shard(model) as the last"
        )
        self.model, self.optimizer, self._shard = model, optimizer, shard
        self._whole = make()
        _check_same(self._whole, model)
        _check_holds(optimizer, model)
        self._spread: dict[str, dict[str, Sequence[Any]]] = {}  # placements of the optimizer's state
        self._devices: dict[str, dict[str, torch.device]] = {}  # of its other tensors
        self._unfinished = False
        # Only carries the state through the cut; the rates are those of `optimizer`.
        self._state = torch.optim.Optimizer(self._whole.parameters(), {})
        self.pruner = EarlyPruner(self._whole, self._state, example, **options)
        self._renewed(self.pruner.cut_epoch is not None)

    @property
    def done(self) -> bool:
        """Whether the network has the size that was asked for."""
        return self.pruner.done

    def observe(self, scale: float = 1.0) -> bool:
        """As `EarlyPruner.observe`. True if it cut: `model` is a new one then."""
        if self._unfinished:
            return self._renewed(True)
        if self.pruner.done:
            return False
        if self.pruner.cuts_next():
            self._fetch()
        else:
            self._fetch_scored()
        return self._renewed(self.pruner.observe(scale))

    def epoch_end(self) -> bool:
        """As `EarlyPruner.epoch_end`. True if it cut: `model` is a new one then."""
        if self._unfinished:
            return self._renewed(True)
        if self.pruner.cut_epoch is not None:
            return False
        self._fetch()
        return self._renewed(self.pruner.epoch_end())

    def state_dict(self) -> dict[str, Any]:
        """As `EarlyPruner.state_dict`; to resume, hand it to the constructor as `state`."""
        return self.pruner.state_dict()

    @torch.no_grad()
    def _fetch_scored(self) -> None:
        """Brings weights and gradients that are scored into the whole copy."""
        scored = {id(parameter) for parameter in self.pruner.scored_parameters()}
        sharded = dict(self.model.named_parameters())
        for name, whole in self._whole.named_parameters():
            if id(whole) in scored:
                whole.copy_(_full(sharded[name]))
                whole.grad = _full(sharded[name].grad)

    @torch.no_grad()
    def _fetch(self) -> None:
        """Brings everything into the whole copy."""
        sharded, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        for name, whole in self._whole.named_parameters():
            mine = sharded[name]
            whole.copy_(_full(mine))
            whole.grad = _full(mine.grad)
            state = self.optimizer.state.get(mine, {})
            self._state.state[whole] = {key: _full(value) for key, value in state.items()}
            self._spread[name] = {key: v.placements for key, v in state.items() if isinstance(v, DTensor)}
            plain = {k: v for k, v in state.items() if isinstance(v, torch.Tensor) and not isinstance(v, DTensor)}
            self._devices[name] = {key: value.device for key, value in plain.items()}
        for name, whole in self._whole.named_buffers():
            whole.copy_(buffers[name])

    def _renewed(self, cut: bool) -> bool:
        """Shards the network anew if it was cut, and gives the optimizer its parameters."""
        if not cut:
            return False
        self._unfinished = True  # until it is sharded: the next call tries again, on the weights as they were then
        old = dict(self.model.named_parameters())
        modes = {name: module.training for name, module in self.model.named_modules()}
        smaller = copy.deepcopy(self._whole)  # shares nothing: the whole one goes on being watched
        for name, module in smaller.named_modules():
            module.training = modes.get(name, module.training)
        for name, parameter in smaller.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(old[name].requires_grad)
        model = self._shard(smaller)
        _check_sharded(model, "shard: returned a model that is not sharded, or not all of it")
        new = dict(model.named_parameters())
        state = {}
        for name, whole in self._whole.named_parameters():
            spread, devices = self._spread.get(name, {}), self._devices.get(name, {})
            state[name] = {}
            for key, value in self._state.state.get(whole, {}).items():
                value = _spread_over(value, new[name], spread[key]) if key in spread else value
                state[name][key] = value.to(devices[key]) if key in devices else value
            if whole.grad is not None:
                new[name].grad = _spread_over(whole.grad, new[name], new[name].placements)
        names = {id(parameter): name for name, parameter in old.items()}
        for group in self.optimizer.param_groups:
            group["params"] = [new[names[id(parameter)]] for parameter in group["params"]]
        self.optimizer.state.clear()
        self.optimizer.state.update({new[name]: values for name, values in state.items() if values})
        self.model, self._unfinished = model, False
        return True


def _full(value: Any) -> Any:
    """The whole of what is spread over processes, on the CPU, in memory of its own."""
    if isinstance(value, DTensor):
        value = value.full_tensor()
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _spread_over(value: torch.Tensor, parameter: DTensor, placements: Sequence[Any]) -> DTensor:
    """Spread over the processes that the parameter is spread over."""
    return distribute_tensor(value.to(parameter.to_local().device), parameter.device_mesh, placements)


def _check_sharded(model: nn.Module, message: str) -> None:
    if not isinstance(model, nn.Module) or not all(isinstance(p, DTensor) for p in model.parameters()):
        raise ModelError(message)


def _check_same(whole: nn.Module, model: nn.Module) -> None:
    mine, theirs = (
        {name: (tuple(t.shape), t.dtype) for name, t in (*m.named_parameters(), *m.named_buffers())}
        for m in (whole, model)
    )
    for name in (*mine, *theirs):
        if mine.get(name) != theirs.get(name):
            raise ArgumentError(
                f"make: gives another network than `model`: its '{name}' is {mine.get(name)}, the model's "
                f"{theirs.get(name)}"
            )
    if any(isinstance(p, DTensor) or p.device.type != "cpu" for p in whole.parameters()):
        raise ArgumentError("make: has to give a network that is not sharded, on the CPU")


def _check_holds(optimizer: Any, model: nn.Module) -> None:
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ArgumentError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    known = {id(parameter) for parameter in model.parameters()}
    if not all(id(p) in known for group in optimizer.param_groups for p in group["params"]):
        raise ArgumentError("optimizer: holds parameters that are not the model's; make it after the model was sharded")
