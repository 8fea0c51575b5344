"""Operators on large tensors that lie in no cache: against plain PyTorch, and against torch's copy of as many bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from stamp_fast.ops import _reference, channel_saliency, pack_weights

from .timing import Contestant, Ratio, in_turns

LINE = 64  # bytes that memory delivers at once
# "clone" copies into fresh memory, as the operators write, "copy_" into memory that is there.
RATIOS = [
    Ratio("PyTorch", "stamp_fast"),
    Ratio("stamp_fast", "clone"),
    Ratio("stamp_fast", "copy_", at_most=1 / 0.8),
    Ratio("stamp_fast", "copy_, lines", at_most=1 / 0.8),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """What one row of the table is about; a new operator is another function that returns one, in CASES.

    Attributes:
        native, reference: give the same tensors, within `tolerance` of the largest element (0: the same bits).
        moved: per tensor, bytes of live data that have to be read and written.
        lines: the same with all that is read or written in whole cache lines.
    """

    native: Callable[[], Sequence[Tensor]]
    reference: Callable[[], Sequence[Tensor]]
    tolerance: float
    moved: Sequence[int]
    lines: Sequence[int]


def _weights(dtype: torch.dtype, layout: torch.memory_format, scaled: bool) -> list[list[Tensor]]:
    """Weights of 3 x 3 convolutions with half of their rows and half of their columns kept, wherever they lie."""
    shapes = [(512, 512, 3, 3)] * 8 + [(1024, 512, 3, 3)] * 4
    tensors = [torch.randn(shape).to(dtype, memory_format=layout) for shape in shapes]
    rows, cols = ([torch.randperm(shape[dim])[: shape[dim] // 2].sort().values for shape in shapes] for dim in (0, 1))
    scales = [torch.rand(shape[1] // 2 if scaled else 0).to(dtype) for shape in shapes]
    return [tensors, rows, cols, scales]


def _bytes_in_lines(tensor: Tensor, rows: Tensor, cols: Tensor) -> int:
    """Bytes of the cache lines that hold the kept elements."""
    kept = torch.zeros(tensor.shape, dtype=torch.bool).contiguous(memory_format=_layout(tensor))
    kept[rows[:, None], cols] = True
    flat = kept.permute(0, 2, 3, 1) if _layout(tensor) == torch.channels_last else kept
    return LINE * int(flat.reshape(-1, LINE // tensor.element_size()).any(1).sum())


def _layout(tensor: Tensor) -> torch.memory_format:
    return torch.contiguous_format if tensor.is_contiguous() else torch.channels_last


def forward(dtype: torch.dtype, layout: torch.memory_format, scaled: bool) -> Case:
    weights = _weights(dtype, layout, scaled)
    packed = [output.nbytes for output in pack_weights(*weights)]
    return Case(
        native=lambda: pack_weights(*weights),
        reference=lambda: _reference.pack_weights(*weights),
        tolerance=0,
        moved=[2 * n for n in packed],
        lines=[n + _bytes_in_lines(*args[:3]) for n, args in zip(packed, zip(*weights, strict=True), strict=True)],
    )


def backward(dtype: torch.dtype, layout: torch.memory_format, scaled: bool) -> Case:
    weights = _weights(dtype, layout, scaled)
    grads = [torch.randn_like(output) for output in pack_weights(*weights)]
    needs = [True] * len(grads), [scaled] * len(grads)

    def native() -> list[Tensor]:
        tensor_grads, scale_grads = torch.ops.stamp_fast.pack_weights_backward(grads, *weights, *needs)
        return tensor_grads + scale_grads

    def reference() -> list[Tensor]:
        tensor_grads, scale_grads = _reference.pack_weights_backward(grads, *weights)
        return tensor_grads + scale_grads

    written = [grad.nbytes + weight.nbytes for grad, weight in zip(grads, weights[0], strict=True)]
    read = zip(*weights, strict=True)
    return Case(
        native=native,
        reference=reference,
        tolerance=1e-5 if dtype == torch.float32 else 1e-2,
        # For the scales' gradients the kept weights are read too.
        moved=[n + scaled * grad.nbytes for n, grad in zip(written, grads, strict=True)],
        lines=[n + scaled * _bytes_in_lines(*args[:3]) for n, args in zip(written, read, strict=True)],
    )


def saliency(dtype: torch.dtype, layout: torch.memory_format) -> Case:
    """Reads an activation and its gradient once."""
    a, g = (torch.randn(64, 128, 56, 56).to(dtype, memory_format=layout) for _ in range(2))
    return Case(
        native=lambda: channel_saliency(a, g),
        reference=lambda: channel_saliency(a, g, backend="reference"),
        tolerance=1e-4,
        moved=[a.nbytes, g.nbytes],
        lines=[a.nbytes, g.nbytes],
    )


CASES = {
    f"pack_weights {direction.__name__}, {dtype}, {layout}{', scaled' if scaled else ''}".replace("torch.", ""): (
        direction,
        (dtype, layout, scaled),
    )
    for direction in (forward, backward)
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last)
    for scaled in (False, True)
} | {
    f"channel_saliency, {dtype}, {layout}".replace("torch.", ""): (saliency, (dtype, layout))
    for dtype in (torch.float32, torch.bfloat16)
    for layout in (torch.contiguous_format, torch.channels_last)
}


def _check(case: Case) -> None:
    for mine, expected in zip(case.native(), case.reference(), strict=True):
        slack = case.tolerance * expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(mine, expected, rtol=0, atol=slack)


def _copying(sizes: Sequence[int], fresh: bool) -> Callable[[], list[Tensor]]:
    """Copies half of the bytes: each is read and written."""
    sources = [torch.ones(size // 2, dtype=torch.uint8) for size in sizes]
    targets = [torch.empty_like(source) for source in sources]
    if fresh:
        return lambda: [source.clone() for source in sources]
    return lambda: [target.copy_(source) for target, source in zip(targets, sources, strict=True)]


@pytest.mark.parametrize("name", CASES)
def test_kernels(measure: Callable[..., None], name: str) -> None:
    torch.manual_seed(0)
    make, arguments = CASES[name]
    case = make(*arguments)
    _check(case)
    other = torch.ones(32 << 20)  # 128 MiB, more than the caches hold
    functions = {
        "stamp_fast": case.native,
        "PyTorch": case.reference,
        "clone": _copying(case.moved, fresh=True),
        "copy_": _copying(case.moved, fresh=False),
        "copy_, lines": _copying(case.lines, fresh=False),
    }

    def contestant(function: Callable[[], object]) -> Contestant:
        return Contestant(lambda _: function(), setup=lambda: other.sum())

    measure(
        name,
        in_turns({key: contestant(function) for key, function in functions.items()}),
        rounds=11,
        ratios=RATIOS,
        bytes=sum(case.moved),
        bytes_in_lines=sum(case.lines),
    )
