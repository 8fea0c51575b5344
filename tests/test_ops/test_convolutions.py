"""The virtually compacted network's convolutions on Triton."""

import pytest
import torch
from test_ops.test_masked_conv2d import needs_triton
from torch import nn

import stamp_fast
from stamp_fast import Budget, config, importance, trace
from stamp_fast.ops import convolutions

pytestmark = needs_triton


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.wide = nn.Conv2d(8, 8, (1, 3), stride=2, padding="valid")
        self.deep = nn.Conv2d(8, 8, 3, groups=8, padding=1)
        self.head = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.first(x)))
        return self.head(self.deep(self.wide(x)).mean((2, 3)))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"  # without a GPU in the interpreter


def test_same_outputs_and_gradients(device):
    model, x = Net().to(device), torch.randn(2, 1, 6, 6, device=device)
    graph = trace(model, x)
    graph.settle()
    keep = graph.select(importance.magnitude(graph), Budget(channels=0.5), ranking="local")
    found = {}
    for backend in ("auto", "triton"):
        config.ran.clear()
        with config.use_backend(backend), graph.masked(keep):
            output = model(x)
            grads = torch.autograd.grad(output.square().sum(), list(model.first.parameters()) + [model.head.weight])
        found[backend] = [output, *grads]
        assert ("masked_conv2d" in config.ran) is (backend == "triton")
    assert config.ran["masked_conv2d"] == "triton" and config.ran["pack_weights"] != "triton"
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_prune_takes_it_and_says_so(device):
    model = Net().to(device)
    loader = [(torch.randn(4, 1, 6, 6, device=device), torch.randint(3, (4,), device=device))] * 2
    options = {"budget": Budget(channels=0.5), "steps": 1, "progress": False, "seed": 0}
    with config.use_backend("triton"):
        stamp_fast.prune(model, loader, **options)
    told = stamp_fast.report(model)
    assert told.backends["masked_conv2d"] == "triton" and "masked_conv2d on triton" in str(told)
    other = Net().to(device)
    stamp_fast.prune(other, loader, **options)
    assert "masked_conv2d" not in stamp_fast.report(other).backends


def test_what_has_no_kernel_is_left_alone():
    x, weight = torch.randn(3, 6, 6), torch.randn(4, 3, 3, 3)
    with config.use_backend("triton"), convolutions():
        config.ran.clear()
        torch.conv2d(x, weight)  # no batch
        torch.conv2d(x[None], weight, padding="same")
        torch.conv2d(x[None].double(), weight.double())
        torch.conv2d(x[None], weight[:3, :1], groups=3)
    assert "masked_conv2d" not in config.ran
