"""A channel graph's operator record as bytes, in the form that tests/cpp/record_reader.h reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stamp_fast import ChannelGraph
from stamp_fast.graph._record import Ref, slot_tensors

__all__ = ["write_record"]


def _number(value: int) -> bytes:
    """Zigzag, then seven bits a byte, low ones first."""
    value = max(-(2**63), min(2**63 - 1, value))
    rest = (value << 1) ^ (value >> 63)
    rest &= 2**64 - 1
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def _numbers(values: Any) -> bytes:
    values = list(values)
    return _number(len(values)) + b"".join(_number(int(v)) for v in values)


def _value(value: Any) -> bytes:
    # The kinds in the order of Value::Kind in csrc/graph/record.h.
    if value is None:
        return _number(0)
    if isinstance(value, Ref):
        return _number(5) + _number(value)
    if isinstance(value, bool):
        return _number(1) + _number(value)
    if isinstance(value, int):
        return _number(2) + _number(value)
    if isinstance(value, float):
        return _number(3)
    if isinstance(value, (list, tuple)):
        return _number(6) + _number(len(value)) + b"".join(_value(item) for item in value)
    return _number(4)


def write_record(graph: ChannelGraph, path: Path) -> None:
    """Shapes, slots, outputs, pinned slots and operators, one behind the other."""
    recording = graph.recording
    parameters = {id(p) for p in graph.model.parameters()}
    is_parameter = [id(t) in parameters for t in slot_tensors(graph.model).values()]
    parts = [_number(len(recording.shapes)), *(_numbers(shape) for shape in recording.shapes)]
    parts += [_numbers(is_parameter), _numbers(recording.outputs), _numbers(sorted(set(recording.pinned)))]
    parts += [_numbers(())]  # ties
    parts += [_number(recording.costed), _number(len(recording.calls))]
    for call in recording.calls:
        name = call.name.encode()
        parts += [_number(len(name)), name, _number(len(call.args)), *map(_value, call.args), _numbers(call.outs)]
    path.write_bytes(b"".join(parts))
