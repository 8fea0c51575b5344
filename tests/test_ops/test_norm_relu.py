import pytest
import torch
from test_ops.test_masked_conv2d import BACKENDS

from stamp_fast import config
from stamp_fast.ops import _reference, norm_relu


@pytest.mark.parametrize(("backend", "device"), BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(("shape", "residual"), [((2, 7, 5, 3), True), ((1, 65, 13, 6), False), ((0, 3, 2, 2), True)])
def test_equals_reference(backend, device, dtype, last, shape, residual):
    form = torch.channels_last if last else torch.contiguous_format
    x = torch.randn(shape).to(device, dtype).contiguous(memory_format=form)
    s, t = torch.randn(2, shape[1], device=device)
    r = torch.randn(shape).to(device, dtype) if residual else None
    grad = torch.randn(shape).to(device, dtype)

    def run(function, *tensors):
        given = [None if v is None else v.detach().requires_grad_() for v in tensors]
        output = function(*given)
        wanted = [v for v in given if v is not None]
        return [output, *torch.autograd.grad(output, wanted, grad.to(output.dtype))]

    exact = run(_reference.norm_relu, *(v if v is None else v.double() for v in (x, s, t, r)))
    plain = run(_reference.norm_relu, x, s, t, r)
    found = run(lambda *given: norm_relu(*given, backend=backend), x, s, t, r)
    assert config.ran["norm_relu"] == backend and (
        backend == "reference" or config.ran["norm_relu_backward"] == backend
    )
    for one, other, value in zip(found, plain, exact, strict=True):
        assert one.dtype == other.dtype and one.shape == value.shape
        if value.numel():
            error, allowed = ((v.double() - value).abs().max() for v in (one, other))
            assert error <= 2 * allowed + 2 * torch.finfo(dtype).eps * (1 + value.abs().max())
    assert found[0].is_contiguous(memory_format=form) or not x.numel()


def test_gradcheck_and_opcheck():
    args = [torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3), torch.randn(2, 3, 4, 5)]
    double = [v.double().requires_grad_() for v in args]
    assert torch.autograd.gradcheck(norm_relu, double)
    torch.library.opcheck(torch.ops.stamp_fast.norm_relu, (*(v.requires_grad_() for v in args), "cpu"))


@pytest.mark.parametrize(
    ("change", "name"),
    [((0, torch.rand(2, 3)), "input"), ((1, torch.rand(4)), "scale"), ((2, torch.rand(3).double()), "shift")],
)
def test_errors_name_the_argument(change, name):
    args = [torch.randn(2, 3, 4, 5), torch.randn(3), torch.randn(3)]
    args[change[0]] = change[1]
    with pytest.raises(RuntimeError, match=f"norm_relu: {name} must have"):
        norm_relu(*args)
