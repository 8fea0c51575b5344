"""Everything that pruning may change, so that it can be put back."""

from __future__ import annotations

import torch
from torch import nn

from ._optimizers import Optimizers, listed


class Snapshot:
    """State of a model, and of the optimizers and average that go with it, from which `restore` goes back.

    Args:
        copy_values: also guards against in-place changes of parameters and buffers, at the price of a copy of them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizers = None,
        ema: nn.Module | None = None,
        copy_values: bool = False,
    ) -> None:
        modules = list(model.modules()) + (list(ema.modules()) if ema is not None else [])
        self.attributes = [(module, dict(module.__dict__)) for module in modules]
        # A forward may put another tensor in the place of a buffer.
        self.tables = [(table, dict(table)) for m in modules for table in (m._parameters, m._buffers)]
        tensors = {}
        for module in modules:
            for table in (module._parameters, module._buffers):
                tensors.update({id(t): t for t in table.values() if t is not None})
        self.tensors = [
            (t, t.data, t.data.clone(memory_format=torch.preserve_format) if copy_values else None, t.grad)
            for t in tensors.values()
        ]
        states = [state for one in listed(optimizer) for state in one.state.values()]
        self.states = [(state, dict(state)) for state in states if isinstance(state, dict)]
        self.rng = torch.get_rng_state()
        homes = {t.device for t in tensors.values() if t.is_cuda}
        self.device_rng = [(device, torch.cuda.get_rng_state(device)) for device in homes]

    def restore(self) -> None:
        for module, attributes in self.attributes:
            for name in module.__dict__.keys() - attributes.keys():
                del module.__dict__[name]
            module.__dict__.update(attributes)
        for table, saved in self.tables:
            table.clear()
            table.update(saved)
        for tensor, data, values, grad in self.tensors:
            if tensor.shape != data.shape or tensor.data_ptr() != data.data_ptr():
                tensor.grad = None
                replace_data(tensor, data)
            if values is not None:
                with torch.no_grad():
                    tensor.copy_(values)
            tensor.grad = grad
        for state, saved in self.states:
            state.clear()
            state.update(saved)
        torch.set_rng_state(self.rng)
        for device, rng in self.device_rng:
            torch.cuda.set_rng_state(rng, device)


def replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """Gives a parameter or buffer new storage, of any shape."""
    # A gradient accumulator that an earlier graph keeps alive remembers the old shape; a change of dtype makes
    # autograd drop it, a change of shape alone does not.
    other = torch.float32 if tensor.dtype != torch.float32 else torch.float64
    tensor.data = torch.empty(0, dtype=other, device=tensor.device)
    tensor.data = data
    torch.clear_autocast_cache()  # it holds casts of parameters by object
