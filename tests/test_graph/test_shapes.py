"""The quick shape functions against torch's meta kernels."""

import pytest
import torch

from stamp_fast.graph._shapes import FAST

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
    assert FAST[ATEN.native_batch_norm.default]([x, *c, True, 0.1, 1e-5]) is NotImplemented
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
