"""Writes down every operator of a forward that runs on meta tensors.

Half the time of a trace is spent in here: the road of an operator whose tensors are all known is kept short.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import _layers
from ._layers import Ref
from ._shapes import FAST, remembered
from ._undisturbed import Caches

_TORCH_DIR = os.path.dirname(torch.__file__) + os.sep
_OWN_DIR = os.path.dirname(__file__) + os.sep
_META = torch.device("meta")
_SMALL = 64  # elements of a constant whose values are kept


@dataclasses.dataclass(slots=True)
class Call:
    """One operator call: arguments in schema order, tensors replaced by `Ref`."""

    name: str
    args: tuple
    outs: list[int]
    module: str
    line: tuple[str, int]

    @property
    def source(self) -> str:
        return f"{self.line[0]}:{self.line[1]}" if self.line[0] else "unknown source"

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
    caches: Caches = dataclasses.field(default_factory=Caches)
    costed: int = 0  # calls of the first forward; those of a second, train-mode one are not counted as cost
    batched: list[int] = dataclasses.field(default_factory=list)  # inputs of which a batch has more, or larger ones


# Called after every operator with the recording so far, the call and the stack of running modules; may raise.
Watch = Callable[[Recording, Call, list[str]], None]


class Recorder(TorchDispatchMode):
    """Sends every operator to meta tensors and writes it down.

    Attributes:
        modules: names of the modules that run now, the innermost last.
        made: every tensor of the trace, oldest first. Kept alive, so that no id is used twice.
        used: which parameters and buffers some operator has taken.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # the wrapper that would keep dynamo away costs more than the operator

    def __init__(self, recording: Recording, tensors: dict[str, torch.Tensor], watch: Watch | None) -> None:
        super().__init__()
        self.recording = recording
        self.watch = watch
        self.modules: list[str] = []
        self.made: list[torch.Tensor] = []
        self.used = bytearray(len(tensors))
        self._known: dict[int, tuple[Ref, torch.Tensor]] = {}  # id -> index and the meta tensor that stands for it
        self._constants: dict[int, int] = {}  # id -> index of real tensors that no parameter or input went into
        self._storages: dict[int, int] = {}
        first: dict[tuple[int, int], int] = {}
        for position, tensor in enumerate(tensors.values()):
            if tensor.is_meta:  # in a replay
                self._known[id(tensor)] = Ref(position), tensor
                self.made.append(tensor)
                continue
            twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=_META)
            self._adopt(tensor, twin, position)
            self._storages[tensor.untyped_storage().data_ptr()] = position
            other = first.setdefault((tensor.data_ptr(), tensor.numel()), position) if tensor.numel() else position
            if other != position:  # two objects with one memory (`a.data = b.data`): a cut would part them
                self.recording.pinned += [other, position]

    def _adopt(self, tensor: torch.Tensor, twin: torch.Tensor, position: int) -> None:
        entry = Ref(position), twin
        self._known[id(tensor)] = entry
        self._known[id(twin)] = entry
        self.made += [tensor, twin]

    def add(self, tensor: torch.Tensor) -> int:
        """Index of a tensor that is new."""
        position = len(self.recording.shapes)
        self.recording.shapes.append(tuple(tensor.shape))
        self.made.append(tensor)
        if tensor.device.type == "meta":
            self._known[id(tensor)] = Ref(position), tensor
        else:
            self._constants[id(tensor)] = position
            if tensor.numel() <= _SMALL:
                self.recording.values[position] = tuple(tensor.detach().flatten().tolist())
        return position

    def add_all(self, tensors: list[torch.Tensor]) -> None:
        for tensor in tensors:
            self.add(tensor)

    def twin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The meta tensor that stands for a parameter or buffer."""
        entry = self._known.get(id(tensor))
        return tensor if entry is None else entry[1]

    def index_of(self, tensor: torch.Tensor) -> int | None:
        entry = self._known.get(id(tensor))
        return self._constants.get(id(tensor)) if entry is None else int(entry[0])

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The short road: every tensor among the arguments is known.
        op = _OPERATORS.get(func) or _operator(func)
        known = self._known
        metas, refs = [], []
        num_slots = len(self.used)
        has_tensor = False
        for value in args:
            kind = type(value)
            if kind in _PLAIN or (kind is list and (not value or type(value[0]) is int)):
                metas.append(value)
                refs.append(value)
                continue
            entry = known.get(id(value))
            if entry is not None:
                metas.append(entry[1])
                refs.append(entry[0])
                has_tensor = True
                if entry[0] < num_slots:
                    self.used[entry[0]] = 1
                continue
            break
        if len(metas) != len(args) or kwargs or not has_tensor:
            return self._unknown(func, op, args, kwargs or {})
        if len(metas) < len(op.defaults):
            refs += op.defaults[len(metas) :]
        result = NotImplemented if op.fast is None else op.fast(metas)
        if result is NotImplemented:
            result = _run(func, metas, {})
        self._write(op, refs, result)
        return result

    def _unknown(self, func, op: Operator, args: tuple, kwargs: dict):
        """The long road: tensors of another origin, lists of tensors, keyword arguments, factories."""
        flat = _tensors_in(args) + _tensors_in(kwargs)
        if all(id(t) not in self._known and t.device.type != "meta" for t in flat):
            # Constants computed from constants keep their values: a forward may ask for them.
            result = func(*args, **kwargs)
        else:
            metas = list(_map(self._to_meta, args))
            meta_kwargs = {k: _map(self._to_meta, v) for k, v in kwargs.items()}
            if meta_kwargs.get("device") is not None:
                meta_kwargs["device"] = _META
            result = NotImplemented if op.fast is None or meta_kwargs else op.fast(metas)
            if result is NotImplemented:
                result = _run(func, metas, meta_kwargs)
        self._write(op, _map(self._to_ref, in_schema_order(func, args, kwargs)), result)
        return result

    def layer(self, layer: nn.Module, x: torch.Tensor, run: Callable) -> Any:
        """Runs one of torch's own layers, or writes down what one like it did with a tensor like this."""
        own = [self._known.get(id(t)) for t in (x, *_layers.own_tensors(layer))]
        key = None if None in own else _layers.key_of(layer, x)
        if key is None:
            return run(layer, x)
        template = _layers.known(key)
        if template is not None:
            return self._repeat(template, [x, *_layers.own_tensors(layer)], [ref for ref, _ in own])
        first, made, calls = len(self.recording.shapes), len(self.made), len(self.recording.calls)
        result = run(layer, x)
        new = range(first, len(self.recording.shapes))
        if len(self.made) - made == len(new):  # nothing from outside came in
            tensors = [x, *_layers.own_tensors(layer), *self.made[made:]]
            done = [(call.name, call.args, call.outs) for call in self.recording.calls[calls:]]
            _layers.learn(key, tensors, len(own), [*(int(ref) for ref, _ in own), *new], done, result)
        return result

    def _repeat(self, template: _layers.Template, tensors: list[torch.Tensor], refs: list[Ref]) -> torch.Tensor:
        for ref in refs:
            if ref < len(self.used):
                self.used[ref] = 1
        with torch._C._DisableTorchDispatch():  # out here this mode would take them for the forward's own
            made = [
                torch.empty_strided(shape, stride, dtype=dtype, device=_META) for shape, stride, dtype in template.made
            ]
            tensors += made
            refs += [Ref(self.add(tensor)) for tensor in made]
        line = _source_line()
        for name, args, outs in template.calls:
            filled = tuple([refs[a] if type(a) is _layers.Place else a for a in args])
            self._note(name, filled, [int(refs[o]) for o in outs], line)
        return tensors[template.result]

    def _to_meta(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        entry = self._known.get(id(value))
        if entry is not None:
            return entry[1]
        if value.device.type == "meta":
            self.add(value)
            return value
        position = self._constants.get(id(value))
        if position is None:
            position = self.add(value)
            owner = self._storages.get(value.untyped_storage().data_ptr())
            if owner is not None:
                self.recording.pinned.append(owner)
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)
        self._adopt(value, twin, position)
        return twin

    def _to_ref(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            position = self.index_of(value)
            position = self.add(value) if position is None else position
            if position < len(self.used):
                self.used[position] = 1
            return Ref(position)
        return value

    def _write(self, op: Operator, refs: list, result: Any) -> None:
        shapes = self.recording.shapes
        outs = []
        for tensor in (result,) if isinstance(result, torch.Tensor) else _tensors_in((result,)):
            position = self.index_of(tensor)
            if position is None or shapes[position] != tuple(tensor.shape):  # new, or changed in place
                position = self.add(tensor)
                source = refs[0] if self.recording.values and refs and isinstance(refs[0], Ref) else None
                if source in self.recording.values and shapes[source] == shapes[position]:
                    # A constant that is moved to the device of the activations keeps its value.
                    self.recording.values.setdefault(position, self.recording.values[source])
            outs.append(position)
        if outs:
            self._note(op.name, tuple(refs), outs, _source_line())

    def _note(self, name: str, args: tuple, outs: list[int], line: tuple[str, int]) -> None:
        call = Call(name, args, outs, self.modules[-1] if self.modules else "", line)
        self.recording.calls.append(call)
        if self.watch is not None:
            self.watch(self.recording, call, self.modules)


@dataclasses.dataclass(slots=True)
class Operator:
    """What is known of an operator before it runs: names and defaults of its arguments, its shape function."""

    name: str
    names: list[str]
    defaults: list
    fast: Callable[[list], Any] | None


_OPERATORS: dict[Any, Operator] = {}
_PLAIN = frozenset((int, float, bool, type(None), str, torch.dtype, torch.layout, torch.memory_format))


def _operator(func: Any) -> Operator:
    arguments = func._schema.arguments
    made = Operator(str(func), [a.name for a in arguments], [a.default_value for a in arguments], FAST.get(func))
    _OPERATORS[func] = made
    return made


def _run(func, args: list, kwargs: dict) -> Any:
    try:
        return remembered(func, args, kwargs)
    except (NotImplementedError, RuntimeError) as error:
        # What a library of operators cannot say on meta tensors is not said as NotImplementedError.
        if func.namespace == "aten" and not isinstance(error, NotImplementedError):
            raise
        return _on_real_zeros(func, args, kwargs)


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


def in_schema_order(func, args: tuple, kwargs: dict) -> list:
    """All arguments of a call, defaults filled in."""
    op = _OPERATORS.get(func) or _operator(func)
    rest = zip(op.names[len(args) :], op.defaults[len(args) :], strict=True)
    return [*args, *(kwargs.get(name, default) for name, default in rest)]


def _on_real_zeros(func, args: list, kwargs: dict) -> Any:
    """An operator without a meta kernel runs on zeros, for its output shapes."""

    def real(value: Any) -> Any:
        return torch.zeros(value.shape, dtype=value.dtype) if isinstance(value, torch.Tensor) else value

    kwargs = {k: _map(real, v) for k, v in kwargs.items()}
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    result = func(*_map(real, args), **kwargs)
    return _map(lambda t: torch.empty_like(t, device="meta"), result)


_is_library: dict[CodeType, bool] = {}


def _source_line() -> tuple[str, int]:
    """File and line of the model's code that is running; torch and this package are not meant."""
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        is_library = _is_library.get(code)
        if is_library is None:
            filename = code.co_filename
            is_library = filename.startswith((_TORCH_DIR, _OWN_DIR)) or "contextlib" in filename
            _is_library[code] = is_library
        if not is_library:
            return code.co_filename, frame.f_lineno
        frame = frame.f_back
    return "", 0


@contextlib.contextmanager
def module_names(
    modules: dict[str, nn.Module],
    stack: list[str],
    layer: Callable[[nn.Module, torch.Tensor, Callable], Any] | None = None,
) -> Iterator[None]:
    """Inside, `stack` holds the names of the modules whose forwards run, the innermost last.

    Args:
        layer: (layer, tensor, call) -> output; takes over the calls of torch's own layers on one tensor.
    """
    names = {id(module): name for name, module in modules.items()}
    original = nn.Module.__call__

    def call(module, *args, **kwargs):
        stack.append(names.get(id(module), type(module).__name__))
        try:
            if layer is not None and type(module) in _layers.LAYER_TYPES and len(args) == 1 and not kwargs:
                return layer(module, args[0], original)
            return original(module, *args, **kwargs)
        finally:
            stack.pop()

    # Global hooks would do, but with any hook every module takes torch's slow road: a third of the time of a trace.
    nn.Module.__call__ = call
    try:
        yield
    finally:
        nn.Module.__call__ = original
