"""Pruned networks on disk: safetensors with a JSON plan in the metadata. No pickle, nothing in a file is executed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from ._files import errors_name, opened, real_path, write
from .errors import ArgumentError, CheckpointError
from .graph import _history
from .graph._snapshot import replace_data
from .pruning_plan import (
    PruningPlan,
    all_or_nothing,
    modules,
    need,
    non_persistent,
    original,
    parsed,
    plan_of,
    put,
    set_structure,
    strided_format,
    tensors,
)

_STATE = ("tied", "shared", "frozen", "eval", "memory_format")
_FORMATS = {"channels_last": (torch.channels_last, 4), "channels_last_3d": (torch.channels_last_3d, 5)}


def save(model: nn.Module, path: str | os.PathLike) -> None:
    """Writes a network, pruned any number of times or never, so that `load` gives it back.

    Holds parameters and buffers (non-persistent ones too) with dtype and memory format, ties, module attributes that
    pruning changed, `requires_grad` and train/eval flags; no optimizer, hooks or code. The file replaces an older one
    at once and whole: whatever happens meanwhile, `path` is the old file or the new one.

    Args:
        model: of torch.compile, DataParallel and DistributedDataParallel the network inside is saved.
        path: where to; any safetensors reader can open it.

    Raises:
        CheckpointError: the file cannot be written, or the model has what it cannot hold.
        ModelError: scripted or lazy modules.
    """
    network = original(model)
    target = real_path(path)
    for name, module in modules(network):
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(f"save: '{name}' has extra state of its own, which a file without pickle cannot hold")
    state: dict[str, Any] = {"tied": {}, "shared": {}, "memory_format": {}}
    stored: dict[str, torch.Tensor] = {}
    first: dict[Any, str] = {}
    named = tensors(network)
    for name, tensor in named.items():
        if tensor.is_meta:
            raise CheckpointError(f"save: '{name}' lies on the meta device and has no values")
        need(tensor.layout is torch.strided, f"save: '{name}' is {tensor.layout}; make it dense first")
        # A wrapper such as DTensor would look like all others of its shape.
        need(
            tensor.data_ptr() != 0 or not tensor.numel(),
            f"save: '{name}' ({type(tensor).__name__}) has no memory of its own",
        )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        twin = first.setdefault(id(tensor), name)
        if twin != name:
            state["tied"][name] = twin
            continue
        twin = first.setdefault(place, name) if tensor.numel() else name
        if twin != name:
            state["shared"][name] = twin
            continue
        stored[name] = tensor.detach()
        for key, (memory_format, _) in _FORMATS.items():
            if strided_format(tensor) is memory_format:
                state["memory_format"][name] = key
    state["frozen"] = [n for n, t in named.items() if isinstance(t, nn.Parameter) and not t.requires_grad]
    state["eval"] = [name for name, module in modules(network) if not module.training]
    metadata = {"format": "pt", "plan": plan_of(network).to_json(), "state": json.dumps(state, separators=(",", ":"))}
    write(_apart(stored), metadata, target)


def load(model_or_factory: nn.Module | Callable[[], nn.Module], path: str | os.PathLike) -> nn.Module:
    """Gives back the network that `save` wrote.

    Args:
        model_or_factory: the dense network, or one pruned exactly like the file, filled in place, all or nothing; or a
            function without arguments that makes the dense network, on the meta device if you like.
        path: a file written by `save`. It may come from anyone: it can set tensors, and numbers that are there.

    Returns:
        The model that was given or made, on its own device (the CPU where that was meta). Gradients are dropped.

    Raises:
        CheckpointError: no such file, damaged, not written by `save`, or of another network; the message says what is
            wrong, and the model is as it was.
    """
    file = real_path(path)
    model = model_or_factory if isinstance(model_or_factory, nn.Module) else _made(model_or_factory)
    network = original(model)
    with errors_name("load", file), opened(file, {"plan", "state"}, "stamp_fast.save") as content:
        plan = PruningPlan.from_json(content.metadata()["plan"])
        state = _checked_state(content.metadata()["state"])
        pruned_alike = _same_cut(network, plan)
        if not pruned_alike:
            plan.check_fits(network)
        # Where the values of a name are stored: a tensor may be tied to one that shares its memory with a third.
        source = {name: state["shared"].get(other, other) for name, other in state["tied"].items()} | state["shared"]
        data = _read(content, network, plan, state, source)
        _check_names(network, plan, state, source, data)
    with all_or_nothing(network):
        _fill(network, state, source, data)
        if not pruned_alike:
            set_structure(network, plan)
    return model


def load_plan(path: str | os.PathLike) -> PruningPlan:
    """The plan in a file written by `save`, for `apply_plan`.

    Raises:
        CheckpointError: as for `load`.
    """
    file = real_path(path)
    with errors_name("load_plan", file), opened(file, {"plan", "state"}, "stamp_fast.save") as content:
        return PruningPlan.from_json(content.metadata()["plan"])


# --- the file -------------------------------------------------------------------------------------------------------
def _made(factory: Any) -> nn.Module:
    if not callable(factory):
        raise ArgumentError(f"load: expected a module or a function that makes one, got {type(factory).__name__}")
    model = factory()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"load: the factory gave {type(model).__name__}, expected a torch.nn.Module")
    return model


def _apart(stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous and on the CPU, no two in the same storage: safetensors takes nothing else."""
    seen: set[int] = set()
    result = {}
    for name, tensor in stored.items():
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


# --- its content ----------------------------------------------------------------------------------------------------
def _checked_state(text: str) -> dict[str, Any]:
    state = parsed(text, "state", _STATE)
    for key in ("tied", "shared", "memory_format"):
        named = isinstance(state[key], dict) and all(isinstance(value, str) for value in state[key].values())
        need(named, f"state: '{key}' does not map names to names")
    for key in ("frozen", "eval"):
        names = isinstance(state[key], list) and all(isinstance(value, str) for value in state[key])
        need(names, f"state: '{key}' is not a list of names")
    for name, value in state["memory_format"].items():
        need(value in _FORMATS, f"state: '{name}' has the unknown memory format '{value}'")
    return state


def _same_cut(network: nn.Module, plan: PruningPlan) -> bool:
    if not any(_history.is_cut(module) for module in network.modules()):
        return False
    own = plan_of(network)
    return (own.shapes, own.kept, own.attributes) == (plan.shapes, plan.kept, plan.attributes)


def _read(
    content: Any, network: nn.Module, plan: PruningPlan, state: dict[str, Any], source: dict[str, str]
) -> dict[str, torch.Tensor]:
    """Every tensor of the file, checked, in memory of its own, on the device of the one it is for."""
    named = tensors(network)
    caches = non_persistent(network)
    data = {}
    for name in content.keys():  # noqa: SIM118  (not a dict)
        need(name not in source, f"'{name}' is stored and tied to another tensor as well")
        try:
            tensor = content.get_tensor(name)
        except Exception as error:  # whatever a reader makes of a dtype that torch does not have
            raise CheckpointError(f"'{name}' cannot be read: {error}") from error
        old = named.get(name)
        if name in plan.shapes:
            need(
                tuple(tensor.shape) == plan.shape(name),
                f"'{name}' has shape {tuple(tensor.shape)} in the file, by its plan {plan.shape(name)}",
            )
        else:
            need(name in caches, f"the model has no parameter or buffer '{name}'")
        if old is not None:
            same_kind = (tensor.is_floating_point(), tensor.is_complex()) == (old.is_floating_point(), old.is_complex())
            need(same_kind, f"'{name}' is {tensor.dtype} in the file and {old.dtype} in the model")
        memory_format, dim = _FORMATS.get(state["memory_format"].get(name), (torch.contiguous_format, tensor.dim()))
        need(dim == tensor.dim(), f"state: the memory format of '{name}' is not one for {tensor.dim()} dims")
        device = torch.device("cpu") if old is None or old.is_meta else old.device
        data[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, memory_format=memory_format)
        data[name].copy_(tensor)
    return data


def _check_names(
    network: nn.Module, plan: PruningPlan, state: dict[str, Any], source: dict[str, str], data: dict[str, torch.Tensor]
) -> None:
    """Whether the file has every tensor that the model needs, ties only what fits, and names only what there is."""
    named = tensors(network)
    for name in plan.shapes:
        need(source.get(name, name) in data, f"has no tensor for '{name}'")
    for name, other in source.items():
        there = name in named and other in named and other in data
        need(there, f"state: ties '{name}' to '{other}', which are not both there")
        kinds = {
            (isinstance(named[n], nn.Parameter), plan.shape(n) if n in plan.shapes else None) for n in (name, other)
        }
        need(len(kinds) == 1, f"state: '{name}' and '{other}' are tied, but not of one kind and shape")
    for name, other in state["tied"].items():
        need(other in named and other not in state["tied"], f"state: ties '{name}' to '{other}', which is tied itself")
    first: dict[int, str] = {}
    for name, tensor in named.items():
        twin = first.setdefault(id(tensor), name)
        together = source.get(name, name) == source.get(twin, twin)
        need(together, f"'{name}' and '{twin}' are one tensor in the model and two in the file")
        need(not tensor.is_meta or source.get(name, name) in data, f"has no tensor for '{name}'")
    for name in state["frozen"]:
        need(isinstance(named.get(name), nn.Parameter), f"state: the model has no parameter '{name}'")
    known = {name for name, _ in modules(network)}
    for name in state["eval"]:
        need(name in known, f"state: the model has no module '{name}'")


def _fill(network: nn.Module, state: dict[str, Any], source: dict[str, str], data: dict[str, torch.Tensor]) -> None:
    named = tensors(network)
    objects = {}
    for name, tensor in named.items():
        if name in state["tied"] or source.get(name, name) not in data:
            continue
        new = data[source.get(name, name)]
        if tensor.is_meta:
            objects[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
        else:
            tensor.grad = None
            replace_data(tensor, new)
            objects[name] = tensor
    for name, other in state["tied"].items():
        objects[name] = objects[other]
    for name, tensor in data.items():
        objects.setdefault(name, tensor)  # buffers that the model has not filled yet
    owners = dict(modules(network))
    for name, tensor in objects.items():
        owner, _, key = name.rpartition(".")
        put(owners[owner], key, tensor)
    frozen, evaluating = set(state["frozen"]), set(state["eval"])
    for name, tensor in tensors(network).items():
        if isinstance(tensor, nn.Parameter):
            tensor.requires_grad_(name not in frozen)
    for name, module in owners.items():
        module.training = name not in evaluating
