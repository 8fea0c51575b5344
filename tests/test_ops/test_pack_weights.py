from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from stamp_fast._load import HAS_CUDA_KERNELS
from stamp_fast.ops import _reference, pack_weights

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=pytest.mark.skipif(
            not (HAS_CUDA_KERNELS and torch.cuda.is_available()), reason="no CUDA kernels or no GPU"
        ),
    ),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@dataclass
class Case:
    """Arguments of one call; `add` appends an item whose kept counts are given (None: all)."""

    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    tensors: list[Tensor] = field(default_factory=list)
    rows: list[Tensor | None] = field(default_factory=list)
    cols: list[Tensor | None] = field(default_factory=list)
    scales: list[Tensor | None] = field(default_factory=list)
    ascending: bool = False  # the kept positions, which some kernels take otherwise

    def add(
        self,
        shape: tuple[int, ...],
        rows: int | None = None,
        cols: int | None = None,
        scaled: bool = False,
        layout: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    ) -> "Case":
        tensor = layout(torch.randn(shape, dtype=self.dtype, device=self.device))
        length = rows or tensor.shape[0] if tensor.ndim == 1 else cols or tensor.shape[1]
        self.tensors.append(tensor)
        self.rows.append(None if rows is None else self._index(tensor.shape[0], rows))
        self.cols.append(None if cols is None else self._index(tensor.shape[1], cols))
        self.scales.append(torch.rand(length, dtype=self.dtype, device=self.device) if scaled else None)
        return self

    def _index(self, size: int, kept: int) -> Tensor:
        index = torch.randperm(size)[:kept].to(self.device)
        return index.sort().values if self.ascending else index

    @property
    def args(self):
        return self.tensors, self.rows, self.cols, self.scales

    @property
    def differentiable(self) -> list[Tensor]:
        return self.tensors + [scale for scale in self.scales if scale is not None]

    def require_grad(self) -> "Case":
        for tensor in self.differentiable:
            tensor.requires_grad_()
        return self

    def native_args(self):
        """As the operator itself takes them: an empty tensor for None."""

        def full(tensors: list[Tensor | None], dtype: torch.dtype) -> list[Tensor]:
            empty = torch.empty(0, dtype=dtype, device=self.device)
            return [empty if tensor is None else tensor for tensor in tensors]

        return (
            self.tensors,
            full(self.rows, torch.int64),
            full(self.cols, torch.int64),
            full(self.scales, self.dtype),
        )


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def every_other_row(tensor: Tensor) -> Tensor:
    return tensor[::2]


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1)


def cnn(dtype: torch.dtype, device: str, ascending: bool = False) -> Case:
    case = Case(dtype, device, ascending=ascending)
    case.add((13, 7, 3, 3), 5, 4, True).add((13, 7, 3, 3), 5, 4, True, channels_last)
    case.add((64, 3, 7, 7), 31).add((64, 3, 7, 7), 31, None, True, channels_last)
    case.add((17, 11, 1, 1), 3, 7, True).add((17, 11, 1, 1), None, 7, False, channels_last)
    case.add((19, 1, 3, 3), 11, None, True).add((19, 1, 5, 5), 11, None, False, channels_last)
    case.add((10, 23), None, 5, True).add((10, 23), 4, None, True).add((10, 23))
    case.add((29,), 8, None, True).add((29,), 8).add((29,)).add((1,), 1, None, True)
    case.add((6, 5, 3), 2, 3, True).add((6, 5, 3, 3, 3), 2, 3, True)
    case.add((6, 5, 2, 3, 3), 2, 3, True, channels_last).add((1, 1, 1, 1), 1, 1, True)
    # strided inputs: dense rows apart, and rows that need a copy
    case.add((14, 6, 3, 3), 5, 3, True, every_other_row).add((9, 14), 3, 4, True, transposed)
    case.add((8, 14, 3, 3), 3, 4, True, transposed).add((30,), 6, None, True, every_other_row)
    case.add((14, 6, 3, 3), 5, 3, True, lambda tensor: channels_last(tensor)[::2])
    # empty in a dimension
    case.add((0, 4, 3, 3)).add((4, 0)).add((0,)).add((5, 3, 0, 3), 2, 2, True)
    # enough work for several threads and several partial sums
    case.add((300, 257, 3, 3), 151, 101, True).add((300, 257, 3, 3), 151, 101, True, channels_last)
    return case.add((70, 1500), 66, 1400, True)


@pytest.mark.parametrize("ascending", [False, True], ids=["any order", "ascending"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_equals_reference(dtype, device, ascending):
    case = cnn(dtype, device, ascending)
    for packed, expected in zip(pack_weights(*case.args), _reference.pack_weights(*case.args), strict=True):
        # One product each: equal to the last bit.
        torch.testing.assert_close(packed, expected, rtol=0, atol=0)


@pytest.mark.parametrize("ascending", [False, True], ids=["any order", "ascending"])
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_equals_reference(dtype, device, ascending, assert_close):
    case = cnn(dtype, device, ascending).require_grad()
    outputs = pack_weights(*case.args)
    grads = [torch.randn_like(output) for output in outputs]
    actual = torch.autograd.grad(outputs, case.differentiable, grads)

    # The reference runs in float64, so that half types are held to the rounding of the result alone.
    wide = Case(torch.float64, device)
    wide.tensors = [tensor.detach().double().requires_grad_() for tensor in case.tensors]
    wide.scales = [s if s is None else s.detach().double().requires_grad_() for s in case.scales]
    wide.rows, wide.cols = case.rows, case.cols
    expected = torch.autograd.grad(
        _reference.pack_weights(*wide.args), wide.differentiable, [grad.double() for grad in grads]
    )
    for mine, reference in zip(actual, expected, strict=True):
        assert mine.dtype == dtype
        scale = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
        assert_close(mine / scale, (reference / scale).to(dtype), check_stride=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_devices_without_a_kernel_get_the_same(dtype, assert_close, monkeypatch):
    calls = []
    for name in ("pack_weights", "pack_weights_backward"):
        function = getattr(_reference, name)
        monkeypatch.setattr(_reference, name, lambda *a, f=function: (calls.append(f.__name__), f(*a))[1])
    case = cnn(dtype, "cpu")
    args = case.native_args()
    flags = [True] * len(case.tensors), [scale is not None for scale in case.scales]

    def results(keys: torch._C.DispatchKeySet) -> list[Tensor]:
        torch.manual_seed(1)
        packed = torch.ops.stamp_fast.pack_weights.default.redispatch(keys, *args)
        grads = [torch.randn_like(output) for output in packed]
        backward = torch.ops.stamp_fast.pack_weights_backward.default
        d_tensors, d_scales = backward.redispatch(keys, grads, *args, *flags)
        return [*packed, *d_tensors, *d_scales]

    native = results(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU))
    assert not calls
    # No library has kernels for this device, so the operators of plain PyTorch run, on the CPU's tensors.
    fallback = results(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1))
    assert calls == ["pack_weights", "pack_weights_backward"]
    for mine, reference in zip(fallback, native, strict=True):
        scale = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
        assert mine.stride() == reference.stride()
        assert_close(mine / scale, reference / scale)


@pytest.mark.parametrize("device", DEVICES)
def test_memory_format_is_kept(device):
    case = Case(device=device).add((8, 6, 3, 3), 4, 3, True, channels_last).add((8, 6, 3, 3), 4, 3, True)
    last, contiguous = pack_weights(*case.require_grad().args)
    assert last.is_contiguous(memory_format=torch.channels_last) and not last.is_contiguous()
    assert contiguous.is_contiguous()
    (last.sum() + contiguous.sum()).backward()
    assert [tensor.grad.stride() for tensor in case.tensors] == [tensor.stride() for tensor in case.tensors]


def test_keep_all_is_a_copy():
    tensor = torch.randn(4, 3)
    (packed,) = pack_weights([tensor], [None], [None], [None])
    assert packed.data_ptr() != tensor.data_ptr()
    assert pack_weights([], [], [], []) == []


def test_gradcheck():
    case = Case(torch.float64).add((5, 4, 3, 3), 3, 2, True).add((5, 4, 2, 2), 3, 2, True, channels_last)
    case.add((7,), 3, None, True).add((6, 5), None, 3, True).add((6, 5), 2, None, False).require_grad()
    n = len(case.tensors)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        scales = iter(inputs[n:])
        filled = [None if scale is None else next(scales) for scale in case.scales]
        return tuple(pack_weights(inputs[:n], case.rows, case.cols, filled))

    assert torch.autograd.gradcheck(function, case.differentiable)


def test_gradient_only_where_needed():
    case = Case().add((5, 4), 3, 2, True).add((5, 4), 3, 2, True).add((5, 4), 3, 2, True)
    case.tensors[0].requires_grad_()
    case.scales[1].requires_grad_()
    outputs = pack_weights(*case.args)
    sum(output.sum() for output in outputs[:2]).backward()
    assert case.tensors[0].grad is not None and case.scales[1].grad is not None
    assert case.scales[0].grad is None and case.tensors[1].grad is None

    tensors, rows, cols, scales = case.native_args()
    grads = [torch.ones_like(output) for output in outputs]
    flags = [True, False, False], [False, True, False]
    d_tensors, d_scales = torch.ops.stamp_fast.pack_weights_backward(grads, tensors, rows, cols, scales, *flags)
    assert [d.numel() for d in d_tensors] == [20, 0, 0]
    assert [d.numel() for d in d_scales] == [0, 2, 0]


def test_unused_output_gets_no_gradient():
    case = Case().add((5, 4), 3, 2, True).add((5, 4), 3, 2, True).require_grad()
    pack_weights(*case.args)[1].sum().backward()
    assert case.tensors[0].grad is None or not case.tensors[0].grad.any()
    assert case.tensors[1].grad.any()


def test_result_does_not_depend_on_threads():
    case = Case().add((300, 257, 3, 3), 151, 101, True).require_grad()
    grads = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        grads.append(torch.autograd.grad(pack_weights(*case.args)[0].square().sum(), case.differentiable))
    for one, two in zip(*grads, strict=True):
        assert torch.equal(one, two)


def test_opcheck():
    case = Case().add((5, 4, 3, 3), 3, 2, True).add((5, 4, 3, 3), 3, None, True, channels_last)
    case.add((7,), 3).add((6, 5), None, 3, True).require_grad()
    torch.library.opcheck(torch.ops.stamp_fast.pack_weights.default, case.native_args())

    frozen = [[t.detach() for t in tensors] for tensors in case.native_args()]
    grads = [torch.randn_like(output) for output in torch.ops.stamp_fast.pack_weights(*frozen)]
    flags = [True, True, True, False], [True, False, False, True]
    backward = torch.ops.stamp_fast.pack_weights_backward.default
    # The backward has no backward of its own; the other utilities apply to it.
    torch.library.opcheck(backward, (grads, *frozen, *flags), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic, assert_close):
    torch._dynamo.reset()
    compiled = torch.compile(pack_weights, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for kept in (3, 4):
        case = Case().add((8, 6, 3, 3), kept, 2, True, channels_last).add((8,), kept, None, True).require_grad()
        outputs, expected = compiled(*case.args), pack_weights(*case.args)
        grads = [torch.randn_like(output) for output in outputs]
        actual_grads = torch.autograd.grad(outputs, case.differentiable, grads)
        expected_grads = torch.autograd.grad(expected, case.differentiable, grads)
        for mine, reference in zip([*outputs, *actual_grads], [*expected, *expected_grads], strict=True):
            assert_close(mine, reference)


_W, _B, _I = torch.zeros(4, 3), torch.zeros(4), torch.tensor([0, 2])


@pytest.mark.parametrize(
    "args, message",
    [
        (([_W], [], [_I], [None]), "rows must have the length of tensors, 1, got 0"),
        (
            ([torch.tensor(1.0)], [None], [None], [None]),
            r"tensors\[0\] must have at least 1 dimension, got 0",
        ),
        (([_W, _I], [None] * 2, [None] * 2, [None] * 2), r"tensors\[1\] must be float32, .* got Long|int64"),
        (([_W], [_I.view(2, 1)], [None], [None]), r"rows\[0\] must have 1 dimension, got shape \(2, 1\)"),
        (([_W], [None], [_I.int()], [None]), r"cols\[0\] must be int64, got Int"),
        (([_B], [None], [_I], [None]), r"cols\[0\] must be empty for a tensor of 1 dimension, got 2 indices"),
        (([_W], [None], [_I], [torch.ones(3)]), r"scales\[0\] must have 2 elements.*packed column, got 3"),
        (([_B], [_I], [None], [torch.ones(4)]), r"scales\[0\] must have 2 elements.*packed row, got 4"),
        (([_W], [None], [None], [torch.ones(3).double()]), r"scales\[0\] must have the dtype .*got Double"),
        (([_W], [_I + 2], [None], [None]), r"rows\[0\] must lie in \[0, 4\), got 4 at position 1"),
        (([_W], [None], [_I - 1], [None]), r"cols\[0\] must lie in \[0, 3\), got -1 at position 0"),
        (([_B], [_I + 2], [None], [None]), r"rows\[0\] must lie in \[0, 4\), got 4 at position 1"),
    ],
)
def test_errors_name_the_argument(args, message):
    with pytest.raises(RuntimeError, match=f"pack_weights: {message}"):
        pack_weights(*args)


def test_fake_kernel_checks_the_same():
    with (
        torch._subclasses.FakeTensorMode(),
        pytest.raises(RuntimeError, match=r"scales\[0\] must have 2 elements"),
    ):
        w, index = torch.zeros(4, 3), torch.zeros(2, dtype=torch.int64)
        pack_weights([w], [None], [index], [torch.ones(3)])


def test_backward_refuses_repeated_indices():
    w = torch.zeros(4, 3, requires_grad=True)
    (packed,) = pack_weights([w], [None], [torch.tensor([1, 1])], [None])
    with pytest.raises(RuntimeError, match=r"cols\[0\] must hold each index once, got 1 again at position 1"):
        packed.sum().backward()


@st.composite
def cases(draw) -> Case:
    torch.manual_seed(draw(st.integers(0, 1000)))
    case = Case(draw(st.sampled_from(DTYPES)), ascending=draw(st.booleans()))
    for _ in range(draw(st.integers(1, 4))):
        ndim = draw(st.integers(1, 5))
        sizes = st.sampled_from([1, 2, 3, 5, 13])
        shape = tuple(draw(sizes) for _ in range(ndim))
        layouts = [lambda tensor: tensor, every_other_row]
        layouts += [transposed] if ndim > 1 else []
        layouts += [channels_last] if ndim in (4, 5) else []
        layout = draw(st.sampled_from(layouts))
        view = layout(torch.empty(shape)).shape
        rows = draw(st.none() | st.integers(1, view[0]))
        cols = draw(st.none() | st.integers(1, view[1])) if ndim > 1 else None
        case.add(shape, rows, cols, draw(st.booleans()), layout)
    return case


@hypothesis.given(cases())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_case_equals_reference(case):
    rtol, atol = {torch.float64: (1e-12, 1e-12), torch.float32: (1e-5, 1e-5)}.get(case.dtype, (2e-2, 2e-2))
    case.require_grad()
    actual, expected = pack_weights(*case.args), _reference.pack_weights(*case.args)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, reference, rtol=0, atol=0)
    grads = [torch.rand_like(output) for output in actual]
    for mine, reference in zip(
        torch.autograd.grad(actual, case.differentiable, grads),
        torch.autograd.grad(expected, case.differentiable, grads),
        strict=True,
    ):
        torch.testing.assert_close(mine, reference, rtol=rtol, atol=atol * 10, check_stride=False)
