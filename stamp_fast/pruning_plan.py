"""Which channels of a dense network stay, apart from any weights: read off a pruned network, replayed on another."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from .errors import ArgumentError, CheckpointError
from .graph import _history
from .graph._model import unwrapped
from .graph._snapshot import Snapshot, replace_data

FORMAT = 1
# Plans of real networks are a few hundred kB; parsing takes some 20 times the text's size in memory.
_LARGEST_JSON = 16 << 20
_DEEPEST_VALUE = 8


@dataclasses.dataclass(frozen=True)
class PruningPlan:
    """What stays of each tensor of a dense network. Holds numbers only, no weights.

    Attributes:
        model: class name of the network; for people, not compared.
        shapes: dense shape of every parameter and buffer, non-persistent buffers only if they were cut.
        kept: for every tensor that was cut, per dim the ascending positions that stay, None where all do.
        attributes: module -> attribute -> (dense value, value): ints, floats, lists and tuples of them.
    """

    model: str
    shapes: dict[str, tuple[int, ...]]
    kept: dict[str, tuple[tuple[int, ...] | None, ...]]
    attributes: dict[str, dict[str, tuple[Any, Any]]]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor after the cut."""
        kept = self.kept.get(name, (None,) * len(self.shapes[name]))
        return tuple(n if index is None else len(index) for n, index in zip(self.shapes[name], kept, strict=True))

    def to_json(self) -> str:
        """
        Raises:
            CheckpointError: a module attribute is of a type that JSON cannot hold.
        """
        indices: dict[tuple[int, ...], int] = {}  # many tensors share one list of positions
        kept = {
            name: [None if index is None else indices.setdefault(index, len(indices)) for index in dims]
            for name, dims in self.kept.items()
        }
        attributes = {
            module: {name: [_encoded(v, f"{module}.{name}") for v in values] for name, values in changed.items()}
            for module, changed in self.attributes.items()
        }
        plan = {"format": FORMAT, "model": self.model, "shapes": self.shapes, "indices": list(indices)}
        return json.dumps({**plan, "kept": kept, "attributes": attributes}, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> PruningPlan:
        """
        Raises:
            CheckpointError: not a plan, or one that contradicts itself; the message says where.
        """
        plan = parsed(text, "plan", ("format", "model", "shapes", "indices", "kept", "attributes"))
        if plan["format"] != FORMAT:
            raise CheckpointError(f"plan: has format {plan['format']!r}, this version reads {FORMAT}")
        need(isinstance(plan["model"], str), "plan: 'model' is not a name")
        need(isinstance(plan["indices"], list), "plan: 'indices' is not a list")
        indices = [_positions(index, i) for i, index in enumerate(plan["indices"])]
        shapes = {}
        for name, shape in _items(plan["shapes"], "shapes"):
            need(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape), f"shapes: '{name}'")
            shapes[name] = tuple(shape)
        kept = {}
        for name, dims in _items(plan["kept"], "kept"):
            need(name in shapes, f"kept: '{name}' has no shape")
            need(isinstance(dims, list) and len(dims) == len(shapes[name]), f"kept: '{name}' needs one entry per dim")
            for dim, (index, size) in enumerate(zip(dims, shapes[name], strict=True)):
                known = index is None or (type(index) is int and 0 <= index < len(indices))
                need(known, f"kept: '{name}' refers to positions that are not there")
                inside = index is None or indices[index][-1] < size
                need(inside, f"kept: '{name}' keeps a position beyond the {size} of dim {dim}")
            kept[name] = tuple(None if index is None else indices[index] for index in dims)
        attributes = {}
        for module, changed in _items(plan["attributes"], "attributes"):
            attributes[module] = dict(_change(module, *item) for item in _items(changed, f"attributes of '{module}'"))
        return PruningPlan(plan["model"], shapes, kept, attributes)

    def check_fits(self, model: nn.Module) -> None:
        """
        Raises:
            CheckpointError: the model is pruned already or another architecture; names the first difference.
        """
        for name, module in modules(model):
            if _history.is_cut(module):
                raise CheckpointError(f"the model is already pruned at '{name}'; give a fresh, dense {self.model}")
        found, caches = tensors(model), non_persistent(model)
        for name, tensor in found.items():
            if name not in self.shapes:
                need(name in caches, f"the model has '{name}', the {self.model} of the plan has not")
            elif tuple(tensor.shape) != self.shapes[name]:
                raise CheckpointError(
                    f"'{name}' has shape {tuple(tensor.shape)}, in the dense {self.model} of the plan "
                    f"{self.shapes[name]}; another architecture, or already pruned"
                )
        for name in self.shapes:
            need(name in found, f"the model has no '{name}', the {self.model} of the plan has")
        named = dict(modules(model))
        for module, changed in self.attributes.items():
            need(module in named, f"attributes: the model has no module '{module}'")
            for name, (dense, _) in changed.items():
                # The module's own dict: nothing of its class can be reached, and no property runs.
                current = named[module].__dict__.get(name)
                need(_is_number_or_list(current), f"attributes: '{module}' has no number or list '{name}' of its own")
                need(
                    _equal(current, dense),
                    f"attributes: '{module}.{name}' is {current!r}, in the dense {self.model} of the plan {dense!r}",
                )


def plan_of(model: nn.Module) -> PruningPlan:
    """What all cuts of this network so far amount to, against the dense network it was.

    Raises:
        CheckpointError: a layer that was cut has been given tensors of another shape since.
    """
    network = original(model)
    lists: dict[bytes, tuple[int, ...]] = {}

    def positions(index: bytes | None) -> tuple[int, ...] | None:
        if index is not None and index not in lists:
            lists[index] = tuple(np.frombuffer(index, np.int64).tolist())
        return None if index is None else lists[index]

    plan = PruningPlan(type(network).__name__, {}, {}, {})
    owners, caches = dict(modules(network)), non_persistent(network)
    for name, tensor in tensors(network).items():
        module, _, key = name.rpartition(".")
        cut = _history.read(owners[module]).tensors.get(key)
        if cut is not None:
            plan.shapes[name] = cut[0]
            plan.kept[name] = tuple(positions(index) for index in cut[1])
            if plan.shape(name) != tuple(tensor.shape):
                raise CheckpointError(
                    f"'{name}' had shape {plan.shape(name)} when it was pruned, now {tuple(tensor.shape)}; replace the "
                    "whole layer instead of its tensors"
                )
        elif name not in caches:
            plan.shapes[name] = tuple(tensor.shape)
    for name, module in modules(network):
        dense = {k: v for k, v in _history.read(module).attributes.items() if k in module.__dict__}
        if dense:
            plan.attributes[name] = {key: (value, module.__dict__[key]) for key, value in dense.items()}
    return plan


def apply_plan(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """Cuts another dense network of the same architecture in the same places, in place, all or nothing.

    Its own weights are sliced, gradients too. Parameter objects stay the same; make optimizers afterwards.

    Args:
        model: dense, of the architecture that the plan was made for.
        plan: from `plan_of` or `load_plan`.

    Returns:
        The same object.

    Raises:
        ArgumentError: no model, or no plan.
        CheckpointError: another architecture, or pruned already; names the first difference, nothing has changed.
    """
    network = original(model)
    if not isinstance(plan, PruningPlan):
        raise ArgumentError(f"plan: expected one from plan_of or load_plan, got {type(plan).__name__}")
    plan.check_fits(network)
    kept_of: dict[int, tuple] = {}
    new = []
    for name, tensor in tensors(network).items():
        kept = plan.kept.get(name, ())
        seen = id(tensor) in kept_of
        need(kept_of.setdefault(id(tensor), kept) == kept, f"'{name}' is tied to a tensor that the plan cuts otherwise")
        if seen or not kept:
            continue
        grad = None if tensor.grad is None else _live(tensor.grad, kept)
        new.append((tensor, _live(tensor.detach(), kept), grad))
    with all_or_nothing(network):
        for tensor, data, grad in new:
            tensor.grad = None  # may not stay beside data of another shape
            replace_data(tensor, data)
            tensor.grad = grad
        set_structure(network, plan)
    return model


def set_structure(model: nn.Module, plan: PruningPlan) -> None:
    """Sets the attributes and writes the records of a plan that fits; the tensors are the caller's."""
    packed: dict[int, bytes] = {}
    cuts = {name: _history.Cut() for name, _ in modules(model)}
    for name, dims in plan.kept.items():
        owner, _, key = name.rpartition(".")
        for index in dims:
            if index is not None and id(index) not in packed:
                packed[id(index)] = np.array(index, np.int64).tobytes()
        cuts[owner].tensors[key] = plan.shapes[name], tuple(None if i is None else packed[id(i)] for i in dims)
    for name, changed in plan.attributes.items():
        cuts[name].attributes.update({key: dense for key, (dense, _) in changed.items()})
    for name, module in modules(model):
        for key, (_, value) in plan.attributes.get(name, {}).items():
            setattr(module, key, value)
        if cuts[name].tensors or cuts[name].attributes:
            _history.write(module, cuts[name])


def strided_format(tensor: torch.Tensor) -> torch.memory_format:
    """The memory format of a tensor; unlike `is_contiguous`, exact where dims of size one make it ambiguous."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    wanted = formats.get(tensor.dim())
    if wanted is not None and tensor.stride() == torch.empty(tensor.shape, device="meta").stride():
        return torch.contiguous_format
    if wanted is not None and tensor.is_contiguous(memory_format=wanted):
        return wanted
    return torch.contiguous_format


def _live(tensor: torch.Tensor, kept: tuple) -> torch.Tensor:
    memory_format = strided_format(tensor)
    for dim, index in enumerate(kept):
        if index is not None:
            tensor = tensor.index_select(dim, torch.tensor(index, device=tensor.device))
    return torch.empty_like(tensor, memory_format=memory_format).copy_(tensor)


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Puts tensors, attributes and flags of the model back if the block raises."""
    before = Snapshot(model)
    tables = [(module, {**module._parameters, **module._buffers}) for module in model.modules()]
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, table in tables:
            for key, tensor in table.items():
                put(module, key, tensor)
        before.restore()
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        raise


def put(module: nn.Module, key: str, tensor: torch.Tensor | None) -> None:
    """Puts a parameter or buffer in the place of the one of that name."""
    table = module._parameters if key in module._parameters else module._buffers
    if table[key] is tensor:
        return
    table[key] = tensor
    if isinstance(module, nn.RNNBase) and key in module._parameters:
        # Recurrent layers keep their parameters in a list too.
        module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]


# --- names ----------------------------------------------------------------------------------------------------------
def original(model: Any) -> nn.Module:
    """The network inside torch.compile, DataParallel and DistributedDataParallel."""
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    inner = unwrapped(model)
    return inner if inner is model else original(inner)


def modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names, as they are without torch.compile around submodules."""
    named = [(n, m) for n, m in model.named_modules(remove_duplicate=False) if "_orig_mod" not in m._modules]
    if any("_orig_mod" in name for name, _ in named):
        named = [(".".join(part for part in name.split(".") if part != "_orig_mod"), m) for name, m in named]
    return named


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under each of its names."""
    return {
        f"{name}.{key}" if name else key: tensor
        for name, module in modules(model)
        for table in (module._parameters, module._buffers)
        for key, tensor in table.items()
        if tensor is not None
    }


def non_persistent(model: nn.Module) -> set[str]:
    """The names of buffers that are no part of the state dict, empty ones too."""
    return {
        f"{name}.{key}" if name else key
        for name, module in modules(model)
        for key in module._non_persistent_buffers_set
    }


# --- values ---------------------------------------------------------------------------------------------------------
def need(condition: bool, message: str) -> None:
    if not condition:
        raise CheckpointError(message)


def parsed(text: str, what: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with exactly these keys.

    Raises:
        CheckpointError: anything else.
    """
    if not isinstance(text, (str, bytes)):
        raise CheckpointError(f"{what}: expected JSON text, got {type(text).__name__}")
    if len(text) > _LARGEST_JSON:
        raise CheckpointError(f"{what}: is {len(text)} characters long, at most {_LARGEST_JSON} are read")
    try:
        found = json.loads(text, parse_constant=lambda name: float("nan"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what}: is not JSON: {error}") from error
    if not isinstance(found, dict) or found.keys() != set(keys):
        raise CheckpointError(f"{what}: expected an object with {', '.join(keys)}")
    return found


def _items(value: Any, what: str) -> list[tuple[str, Any]]:
    need(isinstance(value, dict), f"plan: '{what}' is not an object")
    return list(value.items())


def _positions(value: Any, number: int) -> tuple[int, ...]:
    need(
        isinstance(value, list) and len(value) > 0 and all(type(i) is int for i in value) and value[0] >= 0,
        f"indices: list {number} is not one of positions",
    )
    need(all(a < b for a, b in zip(value, value[1:], strict=False)), f"indices: list {number} is not ascending")
    return tuple(value)


def _change(module: str, name: str, value: Any) -> tuple[str, tuple[Any, Any]]:
    where = f"attributes: '{module}.{name}'"
    need(isinstance(value, list) and len(value) == 2, f"{where} needs a dense and a new value")
    dense, new = (_decoded(v, where) for v in value)
    need(_is_number_or_list(dense) and _alike(dense, new), f"{where} changes from {dense!r} to {new!r}")
    return name, (dense, new)


def _encoded(value: Any, where: str, depth: int = 0) -> Any:
    if isinstance(value, (list, tuple)) and depth < _DEEPEST_VALUE:
        items = [_encoded(v, where, depth + 1) for v in value]
        return {"tuple": items} if isinstance(value, tuple) else items
    if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
        return value
    raise CheckpointError(f"attribute '{where}' changed to {value!r}, which a plan cannot hold")


def _decoded(value: Any, where: str, depth: int = 0) -> Any:
    if isinstance(value, dict) and value.keys() == {"tuple"} and isinstance(value["tuple"], list):
        return tuple(_decoded(value["tuple"], where, depth))
    if isinstance(value, list):
        need(depth < _DEEPEST_VALUE, f"{where} is nested too deeply")
        return [_decoded(v, where, depth + 1) for v in value]
    plain = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    need(plain, f"{where} has a value that is neither a number nor a list")
    return value


def _is_number_or_list(value: Any) -> bool:
    return isinstance(value, (int, float, list, tuple)) and not isinstance(value, bool)


def _alike(dense: Any, new: Any) -> bool:
    """Whether only numbers differ, which stay of their type: all that a cut changes."""
    if isinstance(dense, (list, tuple)):
        same = type(new) is type(dense) and len(new) == len(dense)
        return same and all(_alike(a, b) for a, b in zip(dense, new, strict=True))
    if type(dense) is int:
        return type(new) is int and abs(new) < 2**63
    return type(new) is type(dense) and (isinstance(dense, float) or new == dense)


def _equal(current: Any, dense: Any) -> bool:
    if isinstance(current, (list, tuple)):  # torch.Size is a tuple
        kind = list if isinstance(current, list) else tuple
        same = type(dense) is kind and len(dense) == len(current)
        return same and all(_equal(a, b) for a, b in zip(current, dense, strict=True))
    return type(current) is type(dense) and current == dense
