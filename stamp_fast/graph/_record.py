"""Runs a model once on meta tensors and records every ATen operator. The model is left as found."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Mapping, Set, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import TraceError
from ._hooks import WatchedHooks
from ._recorder import Call, Recorder, Recording, Ref, Watch, module_names
from ._undisturbed import named_modules, undisturbed

if TYPE_CHECKING:
    from ._align import Aligned

__all__ = ["Call", "Recording", "Ref", "call_model", "evaluate", "record", "refs_in", "slot_tensors", "undisturbed"]

BATCH = 2  # of a trace: 1 would hide a batch that absorbs channels


def slot_tensors(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, by its first name. `modules`: those of the model, if they are at hand."""
    parameters: dict[str, torch.Tensor] = {}
    buffers: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for prefix, module in (modules or named_modules(model)).items():
        start = prefix + "." if prefix else ""
        for found, table in ((parameters, module._parameters), (buffers, module._buffers)):
            for name, tensor in table.items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[start + name] = tensor
    return parameters | buffers


def batch_size(inputs: Any) -> int | None:
    """The first dim of the first tensor; tensors whose first dim is of another size go with every batch."""
    return next((v.shape[0] for v in tree_leaves(inputs) if isinstance(v, torch.Tensor) and v.dim()), None)


def batch_of_two(example: Any) -> Any:
    """The example on the meta device, its batch brought to 2: 1 would hide a batch that absorbs channels.

    The batch is the first dim of the first tensor, and of every tensor whose first dim is of the same size. A list
    of tensors among the arguments is a batch itself (detectors take images so): it is brought to two of them.
    """
    if _image_list(example) is not None:
        return _two_of_each(example)
    batch = batch_size(example)

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        has_batch = value.dim() and value.shape[0] == batch
        shape = (BATCH, *value.shape[1:]) if has_batch else value.shape
        return torch.empty(shape, dtype=value.dtype, device="meta")

    return tree_map(convert, example)


def _image_list(example: Any) -> list | None:
    arguments = example.values() if isinstance(example, dict) else example if isinstance(example, (tuple, list)) else ()
    return next((a for a in arguments if isinstance(a, list) and a and isinstance(a[0], torch.Tensor)), None)


def _two_of_each(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype, device="meta")
    if isinstance(value, dict):
        return {key: _two_of_each(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_two_of_each(item) for item in value)
    if isinstance(value, list):
        return [_two_of_each(item) for item in (value * 2)[:2]]
    return value


def fresh(inputs: Any) -> Any:
    """A copy of inputs, for a forward that may work on them in place."""
    return tree_map(lambda v: v.clone() if isinstance(v, torch.Tensor) else v, inputs)


def _output_tensors(value: Any, depth: int = 0) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if depth > 8:
        return []
    if isinstance(value, Mapping):
        items = list(value.values())
    elif isinstance(value, (list, tuple, Set, ValuesView, deque)):
        items = list(value)
    else:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        items = [*getattr(value, "__dict__", {}).values(), *(getattr(value, n) for n in slots if hasattr(value, n))]
    return [t for item in items for t in _output_tensors(item, depth + 1)]


def record(model: nn.Module, example: Any, watch: Watch | None = None) -> Recording:
    """Records one eval-mode forward, and a train-mode one where parameters are used in training only.

    Args:
        model: any module; its parameters may be on any one device, or on meta.
        example: input tensor, or a tuple (positional) or dict (keyword) of inputs, first dim = batch.
        watch: called after every operator.

    Raises:
        TraceError: the forward failed, or returned no tensor.
    """
    modules = named_modules(model)
    tensors = slot_tensors(model, modules)
    recording = Recording(list(tensors), [tuple(t.shape) for t in tensors.values()], [], [], [])
    used = _record_forward(model, modules, tensors, example, recording, watch, training=False)
    recording.costed = len(recording.calls)
    if not all(is_used or not shape for is_used, shape in zip(used, recording.shapes, strict=False)):
        attempt = Recording(recording.slots, list(recording.shapes), [], [], [])
        with contextlib.suppress(TraceError):
            _record_forward(model, modules, tensors, example, attempt, watch, training=True)
            recording.shapes = attempt.shapes
            recording.calls += attempt.calls
            recording.outputs += attempt.outputs
            recording.pinned += attempt.pinned
            recording.values |= attempt.values
            recording.caches += attempt.caches
    return recording


def refs_in(value: Any) -> list[int]:
    """Indices of the tensors among recorded arguments."""
    if isinstance(value, Ref):
        return [int(value)]
    if isinstance(value, (list, tuple)):
        return [position for item in value for position in refs_in(item)]
    return []


def _record_forward(
    model: nn.Module,
    modules: dict[str, nn.Module],
    tensors: dict[str, torch.Tensor],
    example: Any,
    recording: Recording,
    watch: Watch | None,
    training: bool,
) -> bytearray:
    """Adds a forward to the recording; which parameters and buffers it used."""
    inputs = batch_of_two(example)
    with undisturbed(model, modules) as caches:
        for module in modules.values():
            module.__dict__["training"] = training
            if training and isinstance(module, _NormBase) and module.momentum is None:
                module.__dict__["momentum"] = 0.1  # it would ask a buffer without values for its count of batches
        recorder = Recorder(recording, tensors, watch)
        for module in modules.values():
            if isinstance(module, nn.RNNBase):
                # It keeps its parameters in a list too, and checks their device against the input's.
                module.__dict__["_flat_weights"] = [
                    recorder.twin(module._parameters[n]) for n in module._flat_weights_names
                ]
        hooks = WatchedHooks(modules, recorder.made, lambda: len(recording.calls))
        first = len(recording.shapes)
        recorder.add_all(_output_tensors(inputs))
        added = range(first, len(recording.shapes))
        recording.batched = [i for i in added if recording.shapes[i][:1] == (BATCH,) or _image_list(example)]
        with module_names(modules, recorder.modules, recorder.layer):
            try:
                with recorder:
                    output = call_model(model, inputs)
            except TraceError:
                raise
            except Exception as error:
                running = _running_modules(model, error)
                where = f" in module '{running[0]}'" if running and running[0] else ""
                done = f" after {recording.calls[-1]}" if recording.calls else ""
                raise TraceError(
                    f"trace: the forward failed on meta tensors{where}{done}: {type(error).__name__}: {error}. "
                    "Check that `example` is what the model takes; forwards that look at values cannot be traced.",
                    len(recording.calls),
                    running,
                ) from error
        found = [recorder.index_of(t) for t in _output_tensors(output)]
    indices = [position for position in found if position is not None]
    if not indices:
        raise TraceError(f"trace: {type(model).__name__}.forward returned no tensor (got {type(output).__name__})")
    recording.outputs += indices
    recording.caches += caches
    used = recorder.used
    del recorder, inputs, output
    hooks.check_nothing_kept()
    return used


def _running_modules(model: nn.Module, error: BaseException) -> tuple[str, ...]:
    """Names of the modules whose methods the error passed through, the innermost first."""
    names = {id(module): name for name, module in named_modules(model).items()}
    found: list[str] = []
    traceback = error.__traceback__
    while traceback is not None:
        name = names.get(id(traceback.tb_frame.f_locals.get("self")))
        if name is not None and name not in found:
            found.append(name)
        traceback = traceback.tb_next
    return tuple(reversed(found))


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Tuples are positional, dicts keyword arguments, anything else the one argument."""
    if isinstance(inputs, dict):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def evaluate(model: nn.Module, inputs: Any, mode: Aligned | None = None, grad: bool = False) -> Any:
    """The model's output in eval mode, under a dispatch mode if given; model and inputs are left as found.

    Args:
        grad: with gradients, those of inputs and parameters that require them.
    """
    with undisturbed(model), torch.set_grad_enabled(grad):
        model.eval()
        if mode is None:
            return call_model(model, fresh(inputs))
        with module_names(named_modules(model), mode.running), mode:
            return call_model(model, fresh(inputs))
