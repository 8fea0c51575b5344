"""masked_conv2d against plain PyTorch in float64: every backend that there is, forward and gradients."""

import dataclasses
import importlib.metadata
from typing import Any

import pytest
import torch
from torch import Tensor

from stamp_fast import ArgumentError, config
from stamp_fast.ops import _reference, depthwise_conv2d, masked_conv2d, norm_relu, pack_weights

GPU = torch.cuda.is_available()
try:
    TRITON = tuple(map(int, importlib.metadata.version("triton").split(".")[:2]))
except importlib.metadata.PackageNotFoundError:
    TRITON = (0,)
# Interpreters before 3.9 cannot read a loop's bounds with the NumPy of today.
needs_triton = pytest.mark.skipif(((3,) if GPU else (3, 9)) > TRITON, reason="no triton, or an old interpreter")
BACKENDS = [
    pytest.param("reference", "cpu"),
    pytest.param("cpu", "cpu"),
    pytest.param("triton", "cuda" if GPU else "cpu", marks=needs_triton),  # without a GPU interpreted (conftest.py)
    pytest.param("cuda", "cuda", marks=pytest.mark.skipif(not GPU, reason="no GPU")),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
NAMES = ("input", "weight", "bias", "scale", "norm_scale", "norm_shift", "residual")


@dataclasses.dataclass
class Case:
    """Sizes of one call; rows and cols: how many of them live (None: all, by no index)."""

    images: int = 2
    channels: int = 7
    filters: int = 13
    size: tuple[int, int] = (5, 4)
    kernel: tuple[int, int] = (3, 3)
    stride: int = 1
    padding: int | tuple[int, int] = 1
    dilation: int = 1
    groups: int = 1
    rows: int | None = None
    cols: int | None = None
    parts: str = "bias scale norm residual statistics"
    last: bool = True  # channels_last

    def arguments(self, dtype: torch.dtype, device: str) -> dict[str, Any]:
        """Of the operator, in float64 rounded to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)

        def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, dtype=torch.float64).to(of).to(device)

        inner = self.channels // self.groups
        rows = None if self.rows is None else torch.randperm(self.filters)[: self.rows].to(device)
        cols = None if self.cols is None else torch.randperm(inner)[: self.cols].to(device)
        out, live = self.rows or self.filters, (self.cols or inner) * self.groups
        input = draw(self.images, live, *self.size)
        weight = draw(self.filters, inner, *self.kernel) / (inner * self.kernel[0] * self.kernel[1]) ** 0.5
        if self.last:
            input = input.contiguous(memory_format=torch.channels_last)
        found = {"input": input, "weight": weight, "rows": rows, "cols": cols}
        found |= {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        found["bias"] = draw(out) if "bias" in self.parts else None
        found["scale"] = draw(live) if "scale" in self.parts else None
        found["norm"] = (draw(live, of=wide), draw(live, of=wide)) if "norm" in self.parts else None
        found["statistics"] = "statistics" in self.parts
        found["residual"] = None
        if "residual" in self.parts:
            with torch.no_grad():
                found["residual"] = torch.randn_like(masked_conv2d(**found, backend="reference")[0][:, :, :, :])
        return found


CASES = {
    "all": Case(rows=5, cols=4),
    "plain": Case(parts="", last=False),
    "stride": Case(stride=2, cols=4, parts="norm statistics residual", last=False),
    "stride and dilation": Case(stride=2, dilation=2, padding=2, size=(7, 5), parts="norm scale"),
    "stride, 1 x 1": Case(kernel=(1, 1), stride=2, padding=0, rows=12, parts="norm bias"),
    "1 x 1": Case(
        channels=63, filters=40, images=1, kernel=(1, 1), padding=0, rows=33, cols=17, parts="scale statistics"
    ),
    "one channel": Case(channels=1, filters=1, images=1, kernel=(5, 5), padding=2, parts="bias"),
    "unlike sides": Case(kernel=(1, 5), padding=(0, 2), size=(2, 9), rows=7),
    "more than a block": Case(images=1, channels=23, filters=19, size=(6, 7), rows=18, cols=17),
}


def leaves(arguments: dict[str, Any]) -> dict[str, Tensor]:
    found = {name: arguments[name] for name in ("input", "weight", "bias", "scale", "residual")}
    if arguments["norm"] is not None:
        found |= dict(zip(("norm_scale", "norm_shift"), arguments["norm"], strict=True))
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def with_gradients(arguments: dict[str, Any], grads: list[Tensor], backend: str) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    arguments = {n: v.detach().requires_grad_() if n in NAMES and v is not None else v for n, v in arguments.items()}
    if arguments["norm"] is not None:
        arguments["norm"] = tuple(v.detach().requires_grad_() for v in arguments["norm"])
    outputs = masked_conv2d(**arguments, backend=backend)
    outputs = outputs if arguments["statistics"] else (outputs,)
    wanted = leaves(arguments)
    found = torch.autograd.grad(outputs, list(wanted.values()), [g.to(o) for g, o in zip(grads, outputs, strict=True)])
    return dict(zip(("output", "statistics"), outputs, strict=False)) | dict(zip(wanted, found, strict=True))


def widened(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(widened, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_float64_within_twice_the_error_of_plain_pytorch(case, dtype, backend, device):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("Triton has no kernel for float64: test_refusals")
    arguments = case.arguments(dtype, device)
    exact = {name: widened(value) for name, value in arguments.items()}
    with torch.no_grad():
        outputs = masked_conv2d(**exact, backend="reference")
    outputs = outputs if case.parts.count("statistics") else (outputs,)
    grads = [torch.randn_like(output).to(dtype).double() * (0.01 if i else 1) for i, output in enumerate(outputs)]
    expected = with_gradients(exact, grads, "reference")
    plain = with_gradients(arguments, grads, "reference")
    found = with_gradients(arguments, grads, backend)
    # `with_gradients` ran the reference before, so that this says which ran last.
    assert config.ran["masked_conv2d"] == backend
    if backend != "reference":
        assert config.ran["masked_conv2d_backward"] == backend
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error, allowed = ((v[name].double() - value).abs().max() for v in (found, plain))
        # 16-bit floats: two roundings, since the interpreter truncates where a GPU rounds; else the order of sums.
        atol = (16 if dtype.itemsize > 2 else 2) * torch.finfo(dtype).eps * (1 + value.abs().max())
        assert error <= 2 * allowed + atol, f"{name}: {error:.2g}, plain PyTorch {allowed:.2g}"
        assert found[name].dtype == plain[name].dtype
    assert found["output"].is_contiguous(memory_format=torch.channels_last if case.last else torch.contiguous_format)


@pytest.mark.parametrize("groups", [7, 1])
@pytest.mark.parametrize("rows", [None, 4])
def test_groups(groups, rows, assert_close):
    live = rows or 7
    index = None if rows is None else torch.tensor([5, 0, 3, 2])
    x = torch.randn(2, live if groups == 7 else 7, 6, 5)
    weight, bias = torch.randn(7, 7 // groups, 3, 3), torch.randn(live)
    options = {"padding": 1, "groups": live if groups == 7 else 1}
    packed = weight if index is None else weight[index]
    expected = torch.conv2d(x, packed, bias, **options)
    assert_close(masked_conv2d(x, weight, bias, rows=index, **options), expected)


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (2, 4, 5, 5)])
def test_empty_batch_and_no_positions_left_over(backend, device, shape):
    x = torch.randn(shape, device=device, requires_grad=True)
    weight = torch.randn(3, 4, 5, 5, device=device, requires_grad=True)
    norm = torch.rand(4, device=device, requires_grad=True), torch.rand(4, device=device, requires_grad=True)
    output, sums = masked_conv2d(x, weight, norm=norm, statistics=True, backend=backend)
    assert output.shape == (shape[0], 3, 1, 1)
    (output.sum() + sums.sum()).backward()
    assert x.grad.shape == shape
    if shape[0] == 0:
        assert not sums.any() and not weight.grad.any() and not norm[0].grad.any()


@pytest.mark.parametrize("name", ["all", "stride", "1 x 1"])
def test_gradcheck(name):
    arguments = CASES[name].arguments(torch.float64, "cpu")
    norm = arguments.pop("norm")
    tensors = {n: arguments.pop(n) for n in ("input", "weight", "bias", "scale", "residual")}
    given = {n: t.requires_grad_() for n, t in tensors.items() if t is not None}
    inputs = [*given.values(), *(() if norm is None else (v.requires_grad_() for v in norm))]

    def call(*values: Tensor) -> Any:
        named = dict(zip(given, values, strict=False))
        return masked_conv2d(**named, norm=None if norm is None else values[-2:], **arguments)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["all", "plain", "stride"])
def test_opcheck(name):
    arguments = CASES[name].arguments(torch.float32, "cpu")
    pairs = [[arguments[n]] * 2 if isinstance(arguments[n], int) else list(arguments[n]) for n in MOVES]
    norm = arguments["norm"] or (None, None)
    tensors = [arguments["input"], arguments["weight"], arguments["bias"]]
    tensors = [None if t is None else t.requires_grad_() for t in tensors]
    index = [arguments["rows"], arguments["cols"]]
    rest = [arguments["scale"], *norm, arguments["residual"]]
    args = (*tensors, *index, *rest, *pairs, 1, arguments["statistics"], "cpu")
    torch.library.opcheck(torch.ops.stamp_fast.masked_conv2d, args)
    output = torch.ops.stamp_fast.masked_conv2d(*args)[0]
    grad, sums = torch.randn_like(output), torch.randn(2, output.shape[1]).double()
    known = (None, None) if not arguments["statistics"] else (sums, output.detach())
    need = [True, True, *(t is not None for t in (tensors[2], rest[0], rest[1], rest[2], rest[3]))]
    detached = [None if t is None else t.detach() for t in (*tensors[:2], *index, *rest[:3])]
    backward = (grad, *known, *detached, *pairs, 1, need, "cpu")
    checks = ("test_schema", "test_faketensor")  # it is not differentiable
    torch.library.opcheck(torch.ops.stamp_fast.masked_conv2d_backward, backward, test_utils=checks)


MOVES = ("stride", "padding", "dilation")


def test_compiles_without_a_graph_break(assert_close):
    arguments = CASES["all"].arguments(torch.float32, "cpu")
    compiled = torch.compile(lambda **given: masked_conv2d(**given), fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(**arguments), masked_conv2d(**arguments), strict=True):
        assert_close(found, expected)


def test_autocast_casts_what_is_multiplied():
    x, weight, z = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.rand(3)
    norm = torch.rand(3), torch.rand(3)
    with torch.autocast("cpu", torch.bfloat16):
        output, sums = masked_conv2d(x, weight, scale=z, norm=norm, statistics=True)
    assert output.dtype == torch.bfloat16 and sums.dtype == torch.float64
    expected = masked_conv2d(x.bfloat16(), weight.bfloat16(), scale=z.bfloat16(), norm=norm)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=needs_triton)])
def test_vectors_that_are_not_contiguous(backend):
    case = dataclasses.replace(CASES["all"], size=(3, 3), images=1).arguments(torch.float32, "cpu")

    def apart(vector: Tensor) -> Tensor:
        return torch.stack([vector, vector + 1], 1)[:, 0]

    other = case | {name: apart(case[name]) for name in ("rows", "cols", "bias", "scale")}
    other["norm"] = tuple(map(apart, case["norm"]))
    grads = [torch.randn_like(t) for t in masked_conv2d(**case, backend=backend)]
    for one, two in zip(*(with_gradients(c, grads, backend).values() for c in (case, other)), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=needs_triton)])
def test_what_is_no_number_stays_none(backend):
    x = torch.randn(1, 2, 3, 3)
    x[0, 0, 1, 1] = float("nan")
    norm = torch.ones(2), torch.zeros(2)
    output = masked_conv2d(x, torch.randn(3, 2, 1, 1), norm=norm, backend=backend)
    assert output[0, :, 1, 1].isnan().all() and int(output.isnan().sum()) == 3
    assert int(norm_relu(x, *norm, backend=backend).isnan().sum()) == 1


@pytest.mark.parametrize("operator", ["masked_conv2d", "norm_relu", "pack_weights", "depthwise_conv2d"])
def test_a_second_derivative_is_refused(operator):
    x, weight = torch.randn(1, 4, 3, 3, requires_grad=True), torch.randn(4, 4, 1, 1, requires_grad=True)
    rows, ones = torch.tensor([0, 2]), torch.ones(4, requires_grad=True)
    call = {
        "masked_conv2d": lambda: masked_conv2d(x, weight, rows=rows),
        "norm_relu": lambda: norm_relu(x, ones, ones),
        "pack_weights": lambda: pack_weights([x[0]], [rows], [None], [None])[0] * x.sum(),
        "depthwise_conv2d": lambda: depthwise_conv2d(x, ones.view(4, 1, 1, 1) * 1.5),
    }[operator]
    (grad,) = torch.autograd.grad(call().square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=f"{operator}_backward: is not differentiable"):
        grad.square().sum().backward()


@needs_triton
def test_not_contiguous_and_expanded_inputs(assert_close):
    x = torch.randn(2, 8, 8, 14).transpose(1, 3)[:, ::2]  # (2, 7, 8, 8)
    weight = torch.randn(3, 3, 7, 5).permute(3, 2, 1, 0)
    expected = torch.conv2d(x, weight, padding=1)
    for backend in ("cpu", "triton"):
        assert_close(
            masked_conv2d(x, weight, padding=1, backend=backend).contiguous(), expected.contiguous(), check_stride=False
        )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"input": torch.randn(2, 3, 4)}, "input must have 4 dimensions"),
        ({"input": torch.randn(2, 4, 5, 5)}, "input must have 3 live channels"),
        ({"input": torch.randn(2, 3, 5, 5).long()}, "floating-point"),
        ({"bias": torch.randn(3)}, r"bias must have shape \[5\]"),
        ({"scale": torch.randn(5)}, r"scale must have shape \[3\]"),
        ({"norm": (torch.rand(3), torch.rand(4))}, r"norm\[1\] must have shape \[3\]"),
        ({"norm": (torch.rand(3).double(), torch.rand(3))}, r"norm\[0\] must be torch.float32"),
        ({"residual": torch.rand(2, 5, 4, 4)}, "residual must have shape"),
        ({"rows": torch.tensor([5])}, r"rows must lie in \[0, 5\)"),
        ({"rows": torch.empty(0, dtype=torch.int64)}, "rows must hold at least one position"),
        ({"rows": torch.tensor([0.5])}, "rows must be torch.int64"),
        ({"cols": torch.tensor([0, 1, -1])}, r"cols must lie in \[0, 3\)"),
        ({"groups": 2}, "groups must divide the 5"),
        ({"stride": 0}, "stride must be two numbers >= 1"),
        ({"weight": torch.randn(5, 3, 7, 7)}, "is larger than"),
        ({"weight": torch.randn(5, 3, 3, 3).double()}, "weight must be torch.float32"),
    ],
)
def test_errors_name_the_argument(change, text):
    arguments = {"input": torch.randn(2, 3, 5, 5), "weight": torch.randn(5, 3, 3, 3)} | change
    with pytest.raises(RuntimeError, match=f"masked_conv2d: .*{text}"):
        masked_conv2d(**arguments)


@needs_triton
def test_refusals():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(5, 3, 3, 3)
    with pytest.raises(ArgumentError, match="must be one of auto"):
        masked_conv2d(x, weight, backend="tpu")
    with pytest.raises(ArgumentError, match="takes CUDA tensors, got one on cpu"):
        masked_conv2d(x, weight, backend="cuda")
    with pytest.raises(ArgumentError, match="takes float32, bfloat16 and float16"):
        masked_conv2d(x.double(), weight.double(), backend="triton")
    with pytest.raises(ArgumentError, match="has no kernel for this call"):
        masked_conv2d(x, torch.randn(3, 1, 3, 3), groups=3, backend="triton")
    with pytest.raises(ArgumentError, match="padding must be one number or two"):
        masked_conv2d(x, weight, padding=(1, 2, 3))


def test_the_setting_chooses_and_the_flag_tells():
    x, weight = torch.randn(2, 3, 5, 5), torch.randn(5, 3, 3, 3)
    masked_conv2d(x, weight)
    assert config.ran["masked_conv2d"] == "cpu"
    with config.use_backend("reference"):
        masked_conv2d(x, weight)
        assert config.ran["masked_conv2d"] == "reference"
        masked_conv2d(x, weight, backend="cpu")
        assert config.ran["masked_conv2d"] == "cpu"
    assert config.backend == "auto"
    with pytest.raises(ArgumentError, match="backend"), config.use_backend("fast"):
        pass


def test_reference_is_what_the_docstring_says(assert_close):
    """The reference that all is held to, held to a loop."""
    case = Case(rows=3, cols=2, size=(4, 3), images=1).arguments(torch.float64, "cpu")
    output, sums = masked_conv2d(**case, backend="reference")
    rows, cols, (s, t) = case["rows"], case["cols"], case["norm"]
    x = (case["input"] * s[:, None, None] + t[:, None, None]).clamp(min=0)
    expected = torch.empty_like(output)
    for o in range(3):
        for h in range(4):
            for w in range(3):
                total = case["bias"][o] + case["residual"][0, o, h, w]
                for i in range(2):
                    for kh in range(3):
                        for kw in range(3):
                            if 0 <= h + kh - 1 < 4 and 0 <= w + kw - 1 < 3:
                                tap = case["weight"][rows[o], cols[i], kh, kw] * case["scale"][i]
                                total = total + tap * x[0, i, h + kh - 1, w + kw - 1]
                expected[0, o, h, w] = total
    assert_close(output, expected, check_stride=False)
    assert_close(sums, torch.stack([expected.sum((0, 2, 3)), expected.square().sum((0, 2, 3))]))
    assert _reference.masked_conv2d(case["input"], case["weight"][:, :2], *[None] * 7)[1] is None


@needs_triton
def test_addresses_beyond_two_to_the_31():
    """A corner of an input of 2^31.6 elements: memory that nobody touches is never there."""
    side, device = 32768, "cuda" if GPU else "cpu"
    torch.use_deterministic_algorithms(False)  # it would fill the tensor
    x = torch.empty((1, 3, side, side), dtype=torch.float16, device=device, memory_format=torch.channels_last)
    assert x.numel() > 2**31
    x[:, :, -1, -1] = torch.tensor([1.0, 2.0, 3.0])
    x[:, :, 0, 0] = x[:, :, -1, 0] = x[:, :, 0, -1] = 1
    weight = torch.randn(2, 3, 1, 1).half().to(device)
    output = masked_conv2d(x, weight, stride=side - 1, backend="triton")
    expected = torch.einsum("nchw,oc->nohw", x[:, :, :: side - 1, :: side - 1].float(), weight[:, :, 0, 0].float())
    torch.testing.assert_close(output.float(), expected, rtol=1e-2, atol=1e-2)
