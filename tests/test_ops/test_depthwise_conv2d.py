import itertools

import pytest
import torch
from test_ops.test_pack_weights import DEVICES, DTYPES
from torch import Tensor

from stamp_fast._load import HAS_CUDA_KERNELS
from stamp_fast.ops import _reference, depthwise_conv2d

OP = torch.ops.stamp_fast.depthwise_conv2d.default
LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "channels_last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "transposed": lambda tensor: tensor.transpose(2, 3).contiguous().transpose(2, 3),
    "every_other_image": lambda tensor: tensor.repeat_interleave(2, 0)[::2],
}

# shape, filter, stride, padding, dilation
CASES = [
    ((2, 5, 7, 11), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 5, 8, 11), (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 3, 9, 8), (5, 5), (2, 2), (2, 2), (1, 1)),
    ((2, 3, 13, 12), (2, 7), (1, 3), (0, 5), (3, 2)),
    ((3, 4, 5, 6), (1, 1), (1, 2), (0, 1), (1, 1)),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    ((1, 1, 5, 5), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 7, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 3, 3, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
    # several partial sums for each weight
    ((16, 3, 31, 29), (3, 3), (1, 1), (1, 1), (1, 1)),
]


def make(shape, filter, dtype=torch.float32, device="cpu", layout="contiguous") -> tuple[Tensor, Tensor]:
    input = LAYOUTS[layout](torch.randn(shape, dtype=dtype, device=device))
    return input.requires_grad_(), torch.randn(shape[1], 1, *filter, dtype=dtype, device=device, requires_grad=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equals_reference(dtype, layout, device, assert_close):
    for shape, filter, *numbers in CASES:
        input, weight = make(shape, filter, dtype, device, layout)
        output = depthwise_conv2d(input, weight, *numbers)
        grad = torch.randn_like(output)
        actual = [output, *torch.autograd.grad(output, (input, weight), grad)]
        # In float64, so that half types are held to the rounding of the result alone.
        wide = [tensor.detach().double().requires_grad_() for tensor in (input, weight)]
        reference = _reference.depthwise_conv2d(*wide, *numbers)
        expected = [reference, *torch.autograd.grad(reference, wide, grad.double())]
        last = layout == "channels_last" or input.is_contiguous(memory_format=torch.channels_last)
        wanted_format = torch.channels_last if last else torch.contiguous_format
        assert all(tensor.is_contiguous(memory_format=wanted_format) for tensor in actual[:2])
        for mine, wanted in zip(actual, expected, strict=True):
            assert mine.dtype == dtype
            scale = max(1.0, wanted.abs().max().item())
            assert_close(mine / scale, (wanted / scale).to(dtype), check_stride=False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 3, 5, 5), (2, 0, 5, 5), (2, 3, 0, 5)], ids=str)
def test_empty_inputs(shape, device):
    input, weight = make(shape, (3, 3), device=device)
    output = depthwise_conv2d(input, weight, 1, 2)
    assert output.shape == (*shape[:2], shape[2] + 2, shape[3] + 2) and not output.any()
    output.sum().backward()
    assert input.grad.shape == shape and weight.grad.shape == weight.shape and not weight.grad.any()


def test_gradient_only_where_needed():
    input, weight = make((2, 3, 5, 5), (3, 3))
    grad = torch.ones(2, 3, 3, 3)
    numbers = [1, 1], [0, 0], [1, 1]
    for need in itertools.product([False, True], repeat=2):
        grads = torch.ops.stamp_fast.depthwise_conv2d_backward(grad, input, weight, *numbers, need)
        assert [g.numel() for g in grads] == [150 * need[0], 27 * need[1]]
    depthwise_conv2d(input.detach(), weight).sum().backward()
    assert input.grad is None and weight.grad is not None


def test_numbers_stand_for_pairs():
    input, weight = make((2, 3, 11, 11), (3, 3))
    assert torch.equal(
        depthwise_conv2d(input, weight, 2, 3, 2), depthwise_conv2d(input, weight, (2, 2), [3, 3], (2, 2))
    )
    for name in ("stride", "padding", "dilation"):
        for value in ((1, 1, 1), (1,), "same", "ab"):
            with pytest.raises(ValueError, match=f"depthwise_conv2d: {name} must be one number or two, got"):
                depthwise_conv2d(input, weight, **{name: value})


def test_autocast_casts_as_for_conv2d():
    input, weight = make((2, 3, 5, 5), (3, 3))
    with torch.autocast("cpu", torch.bfloat16):
        output = depthwise_conv2d(input, weight)
        assert depthwise_conv2d(input.double(), weight.double()).dtype == torch.float64
        assert depthwise_conv2d(input.bfloat16(), weight).dtype == torch.bfloat16
    assert output.dtype == torch.bfloat16
    output.sum().backward()
    assert input.grad.dtype == weight.grad.dtype == torch.float32


def test_gradcheck():
    for layout, numbers in (("contiguous", (1, 1, 1)), ("channels_last", ((2, 1), (0, 3), (1, 2)))):
        tensors = make((2, 2, 4, 3), (3, 2), torch.float64, "cpu", layout)
        assert torch.autograd.gradcheck(depthwise_conv2d, (*tensors, *numbers))


def test_opcheck():
    backward = torch.ops.stamp_fast.depthwise_conv2d_backward.default
    # The backward has no backward of its own; these utilities apply to it.
    without_gradient = ("test_schema", "test_faketensor")
    for layout, (shape, filter, *numbers) in itertools.product(["contiguous", "channels_last"], CASES[:8]):
        input, weight = (tensor.detach() for tensor in make(shape, filter, torch.float32, "cpu", layout))
        grad = torch.ones_like(OP(input, weight, *numbers))
        torch.library.opcheck(OP, (input, weight, *numbers), test_utils=without_gradient)
        torch.library.opcheck(backward, (grad, input, weight, *numbers, [True, True]), test_utils=without_gradient)
    shape, filter, *numbers = CASES[1]
    torch.library.opcheck(OP, (*make(shape, filter, layout="channels_last"), *numbers))


def test_compiles_without_graph_break(assert_close):
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((2, 3, 7, 8), (3, 4, 9, 6)):
        input, weight = make(shape, (3, 3), layout="channels_last")
        outputs = [f(input, weight, 2, 1) for f in (compiled, depthwise_conv2d)]
        assert_close(*outputs)
        for mine, wanted in zip(*(torch.autograd.grad(out.sum(), (input, weight)) for out in outputs), strict=True):
            assert_close(mine, wanted)


@pytest.mark.parametrize(
    "path",
    ["default", "fake", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_CUDA_KERNELS, reason="no CUDA kernels"))],
)
@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": (3, 5, 5)}, r"input must have 4 dimensions, got shape \(3, 5, 5\)"),
        ({"dtype": torch.int32}, "input must be float32, .* got (torch.int32|Int)"),
        (
            {"weight_dtype": torch.float16},
            "weight must have the dtype of input, (torch.float32, got torch.float16|Float, got Half)",
        ),
        ({"weight": (4, 1, 3, 3)}, r"weight must have shape \(3, 1, height, width\), got \(4, 1, 3, 3\)"),
        ({"weight": (3, 2, 3, 3)}, r"weight must have shape \(3, 1, height, width\), got \(3, 2, 3, 3\)"),
        ({"weight": (3, 1, 3)}, r"weight must have shape \(3, 1, height, width\), got \(3, 1, 3\)"),
        ({"weight": (3, 1, 0, 3)}, r"weight must have shape \(3, 1, height, width\), got \(3, 1, 0, 3\)"),
        ({"stride": (1, 0)}, r"stride\[1\] must lie in \[1, 1073741824\), got 0"),
        ({"padding": (-1, 0)}, r"padding\[0\] must lie in \[0, 1073741824\), got -1"),
        ({"dilation": 2**30}, r"dilation\[0\] must lie in \[1, 1073741824\), got 1073741824"),
        ({"dilation": (1, 3)}, "weight reaches over 7 elements along dimension 3 and .* padded input has, 5"),
    ],
)
def test_errors_name_the_argument(change, message, path):
    change = {"input": (2, 3, 5, 5), "weight": (3, 1, 3, 3), "dtype": torch.float32, **change}
    dtype = change.pop("dtype")
    with torch._subclasses.FakeTensorMode() if path == "fake" else torch.no_grad():
        input = torch.zeros(change.pop("input"), dtype=dtype)
        weight = torch.zeros(change.pop("weight"), dtype=change.pop("weight_dtype", dtype))
        numbers = [change.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
        pairs = [number if isinstance(number, tuple) else (number, number) for number in numbers]
        with pytest.raises(RuntimeError, match=f"depthwise_conv2d: {message}"):
            if path == "cuda":
                # The checks of the CUDA front end come before anything that needs a GPU.
                OP.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), input, weight, *pairs)
            else:
                OP(input, weight, *pairs)


def test_backward_checks_the_gradient():
    input, weight = make((2, 3, 5, 5), (3, 3))
    numbers = [1, 1], [0, 0], [1, 1], [True, True]
    backward = torch.ops.stamp_fast.depthwise_conv2d_backward
    with pytest.raises(RuntimeError, match=r"backward: grad must have the shape of the output, \(2, 3, 3, 3\), got"):
        backward(torch.ones(2, 3, 3, 4), input, weight, *numbers)
    with pytest.raises(RuntimeError, match="backward: grad must have the dtype of input, torch.float32, got"):
        backward(torch.ones(2, 3, 3, 3).double(), input, weight, *numbers)
