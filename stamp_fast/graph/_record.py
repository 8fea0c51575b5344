"""Runs a model once on meta tensors and records every ATen operator (DESIGN 3.1). The model is left as found."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from operator import is_
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules import module as _hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ..errors import TraceError
from ._hooks import WatchedHooks
from ._shapes import FAST, remembered

if TYPE_CHECKING:
    from ._align import Aligned

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(os.path.dirname(__file__))
_BATCH = 2
_SMALL = 64  # elements of a constant whose values are kept


class Ref(int):
    """Index of a tensor among an operator's recorded arguments."""


@dataclasses.dataclass
class Call:
    """One operator call: arguments in schema order, tensors replaced by `Ref`."""

    name: str
    args: tuple
    outs: list[int]
    module: str
    source: str

    def __str__(self) -> str:
        where = f" in module '{self.module}'" if self.module else ""
        return f"{self.name}{where} at {self.source}"


@dataclasses.dataclass
class Recording:
    """What one or more forwards of a model did. Tensors [0, len(slots)) are its parameters and buffers."""

    slots: list[str]
    shapes: list[tuple[int, ...]]
    calls: list[Call]
    outputs: list[int]
    pinned: list[int]
    values: dict[int, tuple] = dataclasses.field(default_factory=dict)  # of small constant tensors
    costed: int = 0  # calls of the first forward; those of a second, train-mode one are not counted as cost


# Called after every operator with the recording so far, the call and the stack of running modules; may raise.
Watch = Callable[[Recording, Call, list[str]], None]


def slot_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer once, by its first name."""
    named = dict(model.named_parameters())
    named.update(model.named_buffers())
    return named


def batch_of_two(example: Any) -> Any:
    """The example on the meta device, its batch brought to 2: 1 would hide a batch that absorbs channels.

    The batch is the first dim of the first tensor, and of every tensor whose first dim is of the same size. A list
    of tensors among the arguments is a batch itself (detectors take images so): it is brought to two of them.
    """
    if _image_list(example) is not None:
        return _two_of_each(example)
    batch = next((v.shape[0] for v in tree_leaves(example) if isinstance(v, torch.Tensor) and v.dim()), None)

    def convert(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        has_batch = value.dim() and value.shape[0] == batch
        shape = (_BATCH, *value.shape[1:]) if has_batch else value.shape
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


@contextlib.contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores whatever a forward may change: flags, caches in modules' __dict__, RNG, attention switches."""
    saved = []
    for module in model.modules():
        # Most containers of a module are empty tables of hooks: those need no copy.
        containers = [v for v in module.__dict__.values() if isinstance(v, (dict, list, set))]
        full = [(v, v.copy()) for v in containers if v]
        saved.append((module.__dict__, module.__dict__.copy(), full, [v for v in containers if not v]))
    deterministic = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    rng = torch.get_rng_state()
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.use_deterministic_algorithms(False)  # it makes other operators of some, on some devices
    try:
        with (
            torch.no_grad(),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.autocast(_autocast_device(model), enabled=False),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic[0], warn_only=deterministic[1])
        torch.backends.mha.set_fastpath_enabled(fastpath)
        torch.set_rng_state(rng)
        for attributes, before, full, empty in saved:
            for container in empty:
                if container:
                    container.clear()
            for container, contents in full:
                _restore_container(container, contents)
            _restore_container(attributes, before)


def _autocast_device(model: nn.Module) -> str:
    first = next(iter(slot_tensors(model).values()), None)
    return "cuda" if first is not None and first.is_cuda else "cpu"


def _restore_container(value: Any, saved: Any) -> None:
    if isinstance(value, list):
        value[:] = saved
    elif isinstance(value, set):
        if value != saved:
            value.clear()
            value.update(saved)
    elif not (
        len(value) == len(saved) and all(map(is_, value.values(), saved.values())) and value.keys() == saved.keys()
    ):
        value.clear()
        value.update(saved)


class _Recorder(TorchDispatchMode):
    """Sends every operator to meta tensors and writes it down."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that would keep dynamo away costs more than the operator

    def __init__(self, recording: Recording, tensors: dict[str, torch.Tensor], watch: Watch | None) -> None:
        super().__init__()
        self.recording = recording
        self.watch = watch
        self.modules: list[str] = []
        self._index: dict[int, int] = {}
        self._twins: dict[int, torch.Tensor] = {}
        self.made: list[torch.Tensor] = []
        self._storages = {}
        for position, tensor in enumerate(tensors.values()):
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._adopt(tensor, twin, position)
            if tensor.device.type != "meta":
                self._storages[tensor.untyped_storage().data_ptr()] = position

    def _adopt(self, tensor: torch.Tensor, twin: torch.Tensor, position: int) -> None:
        self._index[id(tensor)] = position
        self._index[id(twin)] = position
        self._twins[id(tensor)] = twin
        self.made += [tensor, twin]

    def add(self, tensor: torch.Tensor) -> int:
        """Index of a tensor that no recorded operator has made."""
        position = len(self.recording.shapes)
        self.recording.shapes.append(tuple(tensor.shape))
        self._index[id(tensor)] = position
        self.made.append(tensor)
        if tensor.device.type != "meta" and tensor.numel() <= _SMALL:
            self.recording.values[position] = tuple(tensor.detach().flatten().tolist())
        return position

    def add_all(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self.add(tensor)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The meta tensor that stands for a parameter or buffer."""
        return self._twins.get(id(tensor), tensor)

    def index_of(self, tensor: torch.Tensor) -> int | None:
        return self._index.get(id(tensor))

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.device.type == "meta":
            if id(value) not in self._index:
                self.add(value)
            return value
        twin = self._twins.get(id(value))
        if twin is None:
            position = self._index.get(id(value))
            if position is None:
                position = self.add(value)
                owner = self._storages.get(value.untyped_storage().data_ptr())
                if owner is not None:
                    self.recording.pinned.append(owner)
            twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
            self._adopt(value, twin, position)
        return twin

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        flat = _tensors_in(args) + _tensors_in(kwargs)
        if all(t.device.type != "meta" and id(t) not in self._twins for t in flat):
            # Constants computed from constants keep their values: a forward may ask for them.
            result = func(*args, **kwargs)
        else:
            meta_args = _map(self._to_meta, args)
            meta_kwargs = {k: _map(self._to_meta, v) for k, v in kwargs.items()}
            if "device" in meta_kwargs and meta_kwargs["device"] is not None:
                meta_kwargs["device"] = torch.device("meta")
            fast = FAST.get(func)
            result = NotImplemented if fast is None or meta_kwargs else fast(meta_args)
            if result is NotImplemented:
                try:
                    result = remembered(func, meta_args, meta_kwargs)
                except (NotImplementedError, RuntimeError) as error:
                    # What a library of operators cannot say on meta tensors is not said as NotImplementedError.
                    if func.namespace == "aten" and not isinstance(error, NotImplementedError):
                        raise
                    result = _on_real_zeros(func, meta_args, meta_kwargs)
        self._write(func, args, kwargs, result)
        return result

    def _write(self, func, args, kwargs, result) -> None:
        refs = tuple(_map(self._to_ref, value) for value in _in_schema_order(func, args, kwargs))
        shapes = self.recording.shapes
        outs = []
        for tensor in _tensors_in((result,)):
            position = self._index.get(id(tensor))
            if position is None or shapes[position] != tuple(tensor.shape):  # new, or changed in place
                position = self.add(tensor)
                source = refs[0] if refs and isinstance(refs[0], Ref) else None
                if source in self.recording.values and shapes[source] == shapes[position]:
                    # A constant that is moved to the device of the activations keeps its value.
                    self.recording.values.setdefault(position, self.recording.values[source])
            outs.append(position)
        if outs:
            module = self.modules[-1] if self.modules else ""
            call = Call(str(func), refs, outs, module, _source_line())
            self.recording.calls.append(call)
            if self.watch is not None:
                self.watch(self.recording, call, self.modules)

    def _to_ref(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            position = self._index.get(id(value))
            return Ref(self.add(value) if position is None else position)
        return value


def _map(function, value: Any) -> Any:
    # Operator arguments nest lists and tuples at most; pytree costs ten times as much.
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_map(function, item) for item in value])
    return value


def _tensors_in(values: Any) -> list[torch.Tensor]:
    found = []
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors_in(value)
    return found


_schemas: dict[Any, list[tuple[str, Any]]] = {}


def _in_schema_order(func, args: tuple, kwargs: dict) -> list:
    schema = _schemas.get(func)
    if schema is None:
        schema = [(a.name, a.default_value) for a in func._schema.arguments]
        _schemas[func] = schema
    ordered = list(args)
    for name, default in schema[len(args) :]:
        ordered.append(kwargs.get(name, default))
    return ordered


def _on_real_zeros(func, args: tuple, kwargs: dict) -> Any:
    """An operator without a meta kernel runs on zeros, for its output shapes."""

    def real(value: Any) -> Any:
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    kwargs = {k: _map(real, v) for k, v in kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    result = func(*_map(real, args), **kwargs)
    return _map(lambda t: torch.empty_like(t, device="meta"), result)


_library_file: dict[str, bool] = {}


def _source_line() -> str:
    frame = sys._getframe(2)
    while frame is not None:
        filename = frame.f_code.co_filename
        is_library = _library_file.get(filename)
        if is_library is None:
            is_library = filename.startswith((_TORCH_DIR, _OWN_DIR + os.sep + "graph")) or "contextlib" in filename
            _library_file[filename] = is_library
        if not is_library:
            return f"{filename}:{frame.f_lineno}"
        frame = frame.f_back
    return "unknown source"


def _output_tensors(value: Any, depth: int = 0) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if depth > 8:
        return []
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
    else:
        slots = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
        items = [*getattr(value, "__dict__", {}).values(), *(getattr(value, n) for n in slots if hasattr(value, n))]
    return [t for item in items for t in _output_tensors(item, depth + 1)]


@contextlib.contextmanager
def _module_names(model: nn.Module, stack: list[str]) -> Iterator[None]:
    names = {id(module): name for name, module in model.named_modules()}

    def enter(module, args):
        stack.append(names.get(id(module), type(module).__name__))

    def leave(module, args, output):
        stack.pop()

    # Global hooks leave no trace in the modules themselves.
    handles = [
        _hooks.register_module_forward_pre_hook(enter),
        _hooks.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def record(model: nn.Module, example: Any, watch: Watch | None = None) -> Recording:
    """Records one eval-mode forward, and a train-mode one where parameters are used in training only.

    Args:
        model: any module; its parameters may be on any one device, or on meta.
        example: input tensor, or a tuple (positional) or dict (keyword) of inputs, first dim = batch.
        watch: called after every operator.

    Raises:
        TraceError: the forward failed, or returned no tensor.
    """
    tensors = slot_tensors(model)
    recording = Recording(list(tensors), [tuple(t.shape) for t in tensors.values()], [], [], [])
    _record_forward(model, tensors, example, recording, watch, training=False)
    recording.costed = len(recording.calls)
    if _unused(recording):
        attempt = Recording(recording.slots, list(recording.shapes), [], [], [])
        with contextlib.suppress(TraceError):
            _record_forward(model, tensors, example, attempt, watch, training=True)
            recording.shapes = attempt.shapes
            recording.calls += attempt.calls
            recording.outputs += attempt.outputs
            recording.pinned += attempt.pinned
            recording.values |= attempt.values
    return recording


def _unused(recording: Recording) -> bool:
    used = {position for call in recording.calls for position in refs_in(call.args)}
    return any(slot not in used and recording.shapes[slot] for slot in range(len(recording.slots)))


def refs_in(value: Any) -> list[int]:
    """Indices of the tensors among recorded arguments."""
    if isinstance(value, Ref):
        return [int(value)]
    if isinstance(value, (list, tuple)):
        return [position for item in value for position in refs_in(item)]
    return []


def _record_forward(
    model: nn.Module,
    tensors: dict[str, torch.Tensor],
    example: Any,
    recording: Recording,
    watch: Watch | None,
    training: bool,
) -> None:
    inputs = batch_of_two(example)
    with undisturbed(model):
        for module in model.modules():
            module.training = training
        recorder = _Recorder(recording, tensors, watch)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                # It keeps its parameters in a list too, and checks their device against the input's.
                module.__dict__["_flat_weights"] = [
                    recorder.twin(module._parameters[n]) for n in module._flat_weights_names
                ]
        hooks = WatchedHooks(model, recorder.made, lambda: len(recording.calls))
        recorder.add_all(_output_tensors(inputs))
        with _module_names(model, recorder.modules):
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
    del recorder, inputs, output
    hooks.check_nothing_kept()


def _running_modules(model: nn.Module, error: BaseException) -> tuple[str, ...]:
    """Names of the modules whose methods the error passed through, the innermost first."""
    names = {id(module): name for name, module in model.named_modules()}
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


def evaluate(model: nn.Module, inputs: Any, mode: Aligned | None = None) -> Any:
    """The model's output in eval mode, under a dispatch mode if given; model and inputs are left as found."""
    with undisturbed(model):
        model.eval()
        if mode is None:
            return call_model(model, fresh(inputs))
        with _module_names(model, mode.running), mode:
            return call_model(model, fresh(inputs))
