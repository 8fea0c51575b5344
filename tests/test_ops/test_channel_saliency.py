from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from test_ops.test_pack_weights import DEVICES, DTYPES
from torch import Tensor

from stamp_fast.ops import ChannelSaliency, _reference, channel_saliency

OP = torch.ops.stamp_fast.channel_saliency.default


def plain(tensor: Tensor) -> Tensor:
    return tensor


def channels_last(tensor: Tensor) -> Tensor:
    return tensor.to(memory_format=torch.channels_last if tensor.ndim == 4 else torch.channels_last_3d)


def transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)


def every_other_image(tensor: Tensor) -> Tensor:
    return tensor.repeat_interleave(2, 0)[::2]


def expanded(tensor: Tensor) -> Tensor:
    return tensor[:1].expand_as(tensor)


def pair(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    layout: Callable[[Tensor], Tensor] = plain,
    gradient_layout: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """An activation with zeros in it, and a gradient."""
    activation = torch.randn(shape, dtype=dtype, device=device).relu()
    return layout(activation), (gradient_layout or layout)(torch.randn(shape, dtype=dtype, device=device))


def check(activation: Tensor, gradient: Tensor, dim: int, assert_close) -> None:
    actual = channel_saliency(activation, gradient, dim)
    expected = _reference.channel_saliency(activation.double(), gradient.double(), dim)
    # What sums with terms of both signs are measured by.
    sizes = _reference.channel_saliency(activation.double().abs(), gradient.double().abs(), dim)
    for mine, reference, size in zip(actual, expected, sizes, strict=True):
        assert mine.shape == (activation.shape[dim],)
        assert_close(mine / size.clamp(min=1).to(mine.dtype), (reference / size.clamp(min=1)).to(mine.dtype))


CASES = [
    ((4, 5, 6, 7), 1, plain, None),
    ((4, 5, 6, 7), 1, channels_last, None),
    ((4, 5, 6, 7), 1, channels_last, plain),
    ((4, 5, 6, 7), 1, plain, channels_last),
    ((4, 5, 6, 7), -2, channels_last, None),
    ((4, 5, 6, 7), 3, channels_last, plain),
    ((4, 5, 6, 7), 0, channels_last, None),
    ((4, 5, 6, 7), 2, transposed, None),
    ((4, 5, 6, 7), 1, every_other_image, channels_last),
    ((4, 5, 6, 7), 1, expanded, plain),
    ((3, 5, 2, 3, 4), 1, channels_last, None),
    ((3, 5, 2, 3, 4), 2, plain, None),
    ((3, 7, 11), -1, plain, None),
    ((3, 7, 11), 1, transposed, None),
    ((13, 29), 1, plain, None),
    ((13, 29), 0, transposed, None),
    ((31,), 0, plain, None),
    ((31,), -1, plain, None),
    ((1, 1, 1, 1), 1, plain, None),
    ((3, 1, 5, 5), 1, channels_last, None),
    ((3, 5, 1, 1), 1, channels_last, plain),
    # enough work for several threads and several partial sums
    ((64, 16, 24, 24), 1, plain, None),
    ((64, 16, 24, 24), 1, channels_last, None),
    ((2, 67, 61, 61), 1, plain, None),
    ((1, 67, 61, 61), 1, channels_last, None),
    ((67, 3, 61, 61), 0, plain, None),
    ((700, 611), 1, plain, None),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_reference(dtype, device, assert_close):
    for shape, dim, layout, gradient_layout in CASES:
        check(*pair(shape, dtype, device, layout, gradient_layout), dim, assert_close)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "shape", [(0, 5, 3, 3), (4, 0, 3, 3), (4, 5, 0, 3), (4, 5, 3, 0), (0, 5), (4, 0), (0,)], ids=str
)
@pytest.mark.parametrize("dim", [0, -1, 1, 2])
def test_nothing_sums_to_zero(shape, dim, device):
    if dim >= len(shape):
        return
    result = channel_saliency(*pair(shape, device=device), dim)
    for row in result:
        assert torch.equal(row, torch.zeros(shape[dim], device=device))


@pytest.mark.parametrize("device", DEVICES)
def test_by_hand(device):
    activation = torch.tensor([[[1.0, 0.0], [-0.0, 2.0]], [[3.0, -1.0], [0.0, 0.0]]], device=device)
    gradient = torch.tensor([[[2.0, 5.0], [7.0, -3.0]], [[-1.0, 1.0], [1.0, 1.0]]], device=device)
    result = channel_saliency(activation, gradient)
    assert isinstance(result, ChannelSaliency)
    assert result.taylor.tolist() == [6, 6]
    assert result.fisher.tolist() == [10, 18]
    assert result.mean.tolist() == [0.75, 0.5]
    assert result.zero_fraction.tolist() == [0.25, 0.75]
    assert channel_saliency(activation, gradient, 0).taylor.tolist() == [4, 4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [plain, channels_last])
def test_long_sums_stay_exact(dtype, layout):
    activation = layout(torch.full((1, 2, 700, 701), 0.1, dtype=dtype))
    result = channel_saliency(activation, torch.ones_like(activation))
    one = activation[0, 0, 0, 0].item()
    assert result.mean.tolist() == pytest.approx([one, one], rel=1e-6)
    assert result.taylor.tolist() == pytest.approx([one * 700 * 701] * 2, rel=1e-6)


def test_not_a_number_stays_in_its_channel():
    activation, gradient = pair((4, 3, 5, 5))
    activation[2, 1, 3, 3] = torch.nan
    for layout in (plain, channels_last):
        result = torch.stack(channel_saliency(layout(activation), gradient))
        assert result.isnan().tolist() == [[False, True, False]] * 3 + [[False] * 3]


@pytest.mark.parametrize("layout", [plain, channels_last])
def test_result_does_not_depend_on_threads(layout):
    for shape in ((64, 16, 24, 24), (1, 67, 61, 61)):
        activation, gradient = pair(shape, layout=layout)
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(torch.stack(channel_saliency(activation, gradient)))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_devices_without_a_kernel_get_the_same(assert_close, monkeypatch):
    calls = []
    reference = _reference.channel_saliency
    monkeypatch.setattr(_reference, "channel_saliency", lambda *a: (calls.append(a), reference(*a))[1])
    args = (*pair((4, 5, 6, 7)), 1)
    native = OP.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args)
    assert not calls
    fallback = OP.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args)
    assert len(calls) == 1
    assert_close(fallback / 100, native / 100)


def test_backward_raises():
    activation, gradient = pair((4, 5, 6, 7))
    result = channel_saliency(activation.requires_grad_(), gradient)
    with pytest.raises(RuntimeError, match="channel_saliency: is not differentiable; detach its result"):
        (result.taylor.sum() + activation.sum()).backward()
    with torch.no_grad():
        assert not channel_saliency(activation, gradient).taylor.requires_grad


def test_opcheck():
    for layout, dim in ((plain, 1), (channels_last, 1), (channels_last, -1), (plain, 0)):
        torch.library.opcheck(OP, (*pair((4, 5, 6, 7), torch.bfloat16, layout=layout), dim))
    torch.library.opcheck(OP, (*pair((0, 5), torch.float64), 1))


def test_compiles_without_graph_break():
    torch._dynamo.reset()
    compiled = torch.compile(channel_saliency, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 5, 6, 7), (3, 8, 5, 5)):
        activation, gradient = pair(shape, layout=channels_last)
        for mine, expected in zip(compiled(activation, gradient), channel_saliency(activation, gradient), strict=True):
            assert torch.equal(mine, expected)


@pytest.mark.parametrize("fake", [False, True], ids=["real", "fake"])
@pytest.mark.parametrize(
    "shapes, dtypes, dim, message",
    [
        ([(), ()], [torch.float32] * 2, 0, "activation must have at least 1 dimension, got 0"),
        ([(4, 3)] * 2, [torch.int32, torch.float32], 1, "activation must be float32, .* got (Int|torch.int32)"),
        ([(4, 3), (3, 4)], [torch.float32] * 2, 1, r"gradient .* shape of activation, \(4, 3\), got \(3, 4\)"),
        ([(4, 3), (4, 3, 1)], [torch.float32] * 2, 1, r"gradient .* shape of activation, \(4, 3\), got \(4, 3, 1\)"),
        ([(4, 3)] * 2, [torch.float32, torch.float16], 1, "gradient must have the dtype of activation, .*, got"),
        ([(4, 3)] * 2, [torch.float32] * 2, 2, r"dim must lie in \[-2, 2\), got 2"),
        ([(4, 3)] * 2, [torch.float32] * 2, -3, r"dim must lie in \[-2, 2\), got -3"),
    ],
)
def test_errors_name_the_argument(shapes, dtypes, dim, message, fake):
    with torch._subclasses.FakeTensorMode() if fake else torch.no_grad():
        activation, gradient = (torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True))
        with pytest.raises(RuntimeError, match=f"channel_saliency: {message}"):
            channel_saliency(activation, gradient, dim)


@st.composite
def cases(draw) -> tuple[Tensor, Tensor, int]:
    torch.manual_seed(draw(st.integers(0, 1000)))
    shape = tuple(draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 13, 40]), min_size=1, max_size=5)))
    layouts = [plain, every_other_image]
    layouts += [transposed] if len(shape) > 1 else []
    layouts += [channels_last] if len(shape) in (4, 5) else []
    chosen = st.sampled_from(layouts)
    dtype = draw(st.sampled_from(DTYPES))
    return *pair(shape, dtype, "cpu", draw(chosen), draw(chosen)), draw(st.integers(-len(shape), len(shape) - 1))


@hypothesis.given(case=cases())
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_case_equals_reference(case):
    activation, gradient, dim = case
    actual = channel_saliency(activation, gradient, dim)
    expected = _reference.channel_saliency(activation.double(), gradient.double(), dim)
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-3, atol=1e-3)
