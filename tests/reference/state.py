"""Everything about a model and an optimizer that a failed or a read-only call may not change."""

from typing import Any

import torch
from torch import nn


class Frozen:
    """What `model` (and `optimizer`) look like now; `assert_same` compares bits and identities."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        self.model = model
        self.optimizer = optimizer
        self.before = self._look()
        self.rng = torch.get_rng_state()

    def _look(self) -> dict[str, Any]:
        look: dict[str, Any] = {}
        for name, module in self.model.named_modules(remove_duplicate=False):
            for key, value in module.__dict__.items():
                look[f"{name}/{key}"] = _copy(value)
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            look[f"tensor {name}"] = [id(tensor), tensor.data_ptr(), _copy(tensor.data), tensor.requires_grad]
            look[f"grad {name}"] = _copy(tensor.grad)
            look[f"stride {name}"] = tensor.stride()
        if self.optimizer is not None:
            look["optimizer"] = _copy(self.optimizer.state_dict())
            look["groups"] = [[id(p) for p in g["params"]] for g in self.optimizer.param_groups]
        return look

    def assert_same(self, *, rng: bool = True) -> None:
        now = self._look()
        assert list(now) == list(self.before)
        for key, value in self.before.items():
            assert same(value, now[key]), f"{key} has changed"
        if rng:
            assert torch.equal(torch.get_rng_state(), self.rng), "the random state has moved"


def _copy(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copy(v) for v in value]
    if isinstance(value, set):
        return set(value)
    return value


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(_bits(a), _bits(b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and (a is b or bool(a == b))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """NaN equals NaN."""
    return tensor.nan_to_num(nan=12345.0) if tensor.is_floating_point() and tensor.device.type != "meta" else tensor
