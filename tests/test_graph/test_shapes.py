"""The quick shape functions against torch's meta kernels."""

import pytest
import torch

from stamp_fast.graph import _shapes
from stamp_fast.graph._shapes import FAST, remembered

META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def signature(result):
    tensors = [result] if isinstance(result, torch.Tensor) else list(result)
    return [(tuple(t.shape), t.stride(), t.dtype) for t in tensors]


def both(func, args):
    return FAST[func](list(args)), func(*args)


ATEN = torch.ops.aten
CONV = [
    ((2, 3, 9, 7), (5, 3, 3, 3), [1, 1], [1, 1], [1, 1], 1),
    ((2, 4, 9, 7), (6, 2, 3, 1), [2, 3], [0, 2], [2, 1], 2),
    ((1, 8, 11), (8, 1, 5), [2], [2], [1], 8),
    ((2, 3, 5, 6, 7), (4, 3, 2, 2, 2), [1], [0], [1], 1),
    ((2, 3, 9, 9), (5, 3, 9, 9), [1, 1], [0, 0], [1, 1], 1),
]


@pytest.mark.parametrize(("x", "w", "stride", "padding", "dilation", "groups"), CONV)
def test_convolution(x, w, stride, padding, dilation, groups):
    args = (empty(*x), empty(*w), empty(w[0]), stride, padding, dilation, False, [0] * len(stride), groups)
    fast, slow = both(ATEN.convolution.default, args)
    assert signature(fast) == signature(slow)


@pytest.mark.parametrize(
    "args",
    [
        (empty(2, 3, 4, 4), empty(5, 3, 7, 7)),  # larger than the image
        (empty(2, 4, 8, 8), empty(5, 3, 3, 3)),  # channels do not fit
        (empty(3, 8, 8), empty(5, 3, 3, 3)),  # no batch
    ],
)
def test_convolution_leaves_what_is_not_plain(args):
    rest = (None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1)
    assert FAST[ATEN.convolution.default]([*args, *rest]) is NotImplemented


def test_batch_norm():
    x, c = empty(2, 6, 4, 4), [empty(6) for _ in range(4)]
    fast, slow = both(ATEN.native_batch_norm.default, (x, *c, False, 0.1, 1e-5))
    assert signature(fast) == signature(slow)
    fast, slow = both(ATEN.native_batch_norm.default, (x, *c, True, 0.1, 1e-5))
    assert signature(fast) == signature(slow)
    fast, slow = both(ATEN.native_batch_norm.default, (x, None, None, None, None, True, 0.1, 1e-5))
    assert signature(fast) == signature(slow)
    wrong = [empty(5) for _ in range(4)]
    assert FAST[ATEN.native_batch_norm.default]([x, *wrong, False, 0.1, 1e-5]) is NotImplemented


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat(dim):
    shape = [2, 3, 4]
    other = list(shape)
    other[dim] = 7
    fast, slow = both(ATEN.cat.default, ([empty(*shape), empty(*other)], dim))
    assert signature(fast) == signature(slow)
    assert FAST[ATEN.cat.default]([[empty(2, 3), empty(3, 2)], 0]) is NotImplemented


@pytest.mark.parametrize(
    "func", [f for f in FAST if f.overloadpacket.__name__.strip("_") in ("add", "mul", "sub", "div")]
)
def test_binary(func):
    x, y = empty(2, 3), empty(2, 3)
    fast, slow = both(func, (x, y))
    assert signature(fast) == signature(slow)
    assert FAST[func]([x, empty(3)]) is NotImplemented
    assert FAST[func]([x, empty(2, 3, dtype=torch.float64)]) is NotImplemented


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 3), ()])
def test_unary(shape):
    for func in (f for f in FAST if len(f._schema.arguments) == 1):
        fast, slow = both(func, (empty(*shape),))
        assert signature(fast) == signature(slow), func
    assert FAST[ATEN.sigmoid.default]([empty(2, dtype=torch.int64)]) is NotImplemented


def test_in_place_returns_its_argument():
    x = empty(2, 3)
    assert FAST[ATEN.relu_.default]([x]) is x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("shape", "normalized"), [((2, 5, 8), [8]), ((2, 3, 4, 6), [4, 6])])
def test_layer_norm(shape, normalized, affine, dtype):
    weights = [empty(*normalized, dtype=dtype) if affine else None for _ in range(2)]
    args = (empty(*shape, dtype=dtype), normalized, *weights, 1e-5)
    fast, slow = both(ATEN.native_layer_norm.default, args)
    assert signature(fast) == signature(slow)


def test_layer_norm_leaves_what_is_not_plain():
    weight, rule = empty(8), FAST[ATEN.native_layer_norm.default]
    for x in (empty(2, 5, 7), empty(2, 8, 5).transpose(1, 2), empty(2, 8, dtype=torch.bfloat16)):
        assert rule([x, [8], weight, weight, 1e-5]) is NotImplemented


def test_addmm():
    fast, slow = both(ATEN.addmm.default, (empty(5), empty(2, 3), empty(3, 5)))
    assert signature(fast) == signature(slow)
    rule = FAST[ATEN.addmm.default]
    assert rule([empty(5), empty(2, 4), empty(3, 5)]) is NotImplemented
    assert rule([empty(2, 5), empty(2, 3), empty(3, 5)]) is NotImplemented


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (ATEN.mean.dim, (empty(2, 3, 4, 4), [2, 3], True), {}),
        (ATEN.mean.dim, (empty(2, 3, 4, 4), [2, 3], False), {}),
        (ATEN.mul.Tensor, (empty(2, 3, 4), empty(3, 1)), {}),
        (ATEN.add.Tensor, (empty(2, 3), empty(2, 3)), {"alpha": 2}),
        (ATEN.max.dim, (empty(2, 3), 1), {}),
        (ATEN._to_copy.default, (empty(2, 3),), {"dtype": torch.float64}),
        (ATEN.mul.Scalar, (empty(2, 3), 0.5), {}),
        (ATEN.mul.Scalar, (empty(2, 3, dtype=torch.int64), 2), {}),
        (ATEN.mul.Scalar, (empty(2, 3, dtype=torch.int64), 2.0), {}),
    ],
)
def test_remembered_is_what_the_kernel_said(func, args, kwargs):
    first = signature(remembered(func, args, kwargs))
    again = signature(remembered(func, args, kwargs))
    assert first == again == signature(func(*args, **kwargs))


def test_views_and_in_place_operators_are_not_remembered():
    x = empty(2, 3)
    for func, args in ((ATEN.view.default, (x, [6])), (ATEN.relu_.default, (x,)), (ATEN.t.default, (x,))):
        before = len(_shapes._known)
        remembered(func, args, {})
        assert len(_shapes._known) == before
    assert remembered(ATEN.relu_.default, (x,), {}) is x
