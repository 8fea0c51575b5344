"""The model itself: what of it can be traced, and which module a tensor belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..errors import ArgumentError, ModelError
from ._record import slot_tensors
from ._undisturbed import named_modules


def unwrapped(model: Any) -> nn.Module:
    """The module whose parameters can be cut: the original of a compiled one."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    original = getattr(model, "_orig_mod", None)
    if isinstance(original, nn.Module):
        return original
    for name, module in named_modules(model).items():
        if isinstance(module, torch.jit.ScriptModule):
            what = f"'{name}' is a ScriptModule, which" if name else "a ScriptModule"
            raise ModelError(f"model: {what} cannot be pruned; prune the original module and script it again")
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            what = f"'{name}' is" if name else "is"
            raise ModelError(
                f"model: {what} wrapped in {type(module).__name__}; prune `model.module`, then wrap it again"
            )
        for key, tensor in module._parameters.items():
            if tensor is not None and not isinstance(tensor, nn.Parameter):
                # A cut would go with what stands in for the parameter, and leave its marks on the module.
                raise ModelError(
                    f"model: another tensor stands for the parameter '{name + '.' if name else ''}{key}' for a while; "
                    "leave `graph.masked` or `functional_call` first"
                )
    for name, parameter in slot_tensors(model).items():
        if is_traceable_wrapper_subclass(parameter.data):
            raise ModelError(
                f"model: parameter '{name}' is a {type(parameter.data).__name__}, sharded or quantised; prune before "
                "that is done to the model (while it trains under FSDP2: stamp_fast.early.sharded)"
            )
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"model: parameter '{name}' is lazy and has no shape yet; run one forward first")
    return model


def owners(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in named_modules(model).values():
        for table in (module._parameters, module._buffers):
            for key, tensor in table.items():
                if tensor is not None:
                    owners.setdefault(id(tensor), []).append((module, key))
    return owners


def places(modules: dict[str, nn.Module], name: str) -> set:
    """The modules within the module of that name, or (module, key) of the parameter or buffer; empty for neither."""
    if not name:
        return set()
    if name in modules:
        return set(modules[name].modules())
    owner, _, key = str(name).rpartition(".")
    module = modules.get(owner)
    tensors = {} if module is None else module._parameters | module._buffers
    if tensors.get(key) is not None:
        return {(module, key)}
    layer, is_numbered, _ = str(name).rpartition("#")  # as `ChannelGraph` numbers groups of one name
    return places(modules, layer) if is_numbered else set()


def layer_of(parameter: str) -> str:
    """The layer that a parameter belongs to, be it parametrized or not."""
    layer, parametrized, _ = parameter.partition(".parametrizations")
    return layer if parametrized else parameter.rpartition(".")[0] or parameter
