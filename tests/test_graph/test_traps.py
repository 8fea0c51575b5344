"""Forwards that once gave a wrong network without a word, or crashed: each is right, or kept and said to be."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from reference.randomise import random_keep, randomise, relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import stamp_fast
from stamp_fast import ArgumentError, CompactionError, trace
from stamp_fast.graph._verify import masked_output


class Net(nn.Module):
    """conv a -> body -> conv b -> mean -> head"""

    def __init__(self, body: Callable[[torch.Tensor], torch.Tensor], width: int = 16) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(width, 8, 3), nn.Linear(8, 4)
        self.body = body

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.b(self.body(torch.relu(self.a(x))))).mean((2, 3)))


def image(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, 8, 8, dtype=torch.float64)


def settled(net: nn.Module, x: torch.Tensor) -> stamp_fast.ChannelGraph:
    graph = trace(randomise(net).double().eval(), x)
    graph.settle()
    return graph


def assert_exact(graph: stamp_fast.ChannelGraph, x: torch.Tensor) -> None:
    keep = random_keep(graph)
    with torch.no_grad():
        expected = masked_output(graph, keep, x)
        graph.compact(keep)
        assert relative_error(graph.model(x), expected) < 1e-9


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(lambda h: h / torch.sqrt(torch.tensor(float(h.shape[1]))), id="tensor"),
        pytest.param(lambda h: h * torch.as_tensor(h.shape[1]), id="as_tensor"),
        pytest.param(lambda h: h * torch.full((), h.shape[1], device=h.device), id="full"),
        pytest.param(lambda h: h * h[:, :1, :, h.shape[1] // 4].unsqueeze(-1), id="select"),
    ],
)
def test_values_that_follow_a_width_are_seen(body):
    x = image()
    graph = settled(Net(body), x)
    assert "a" not in {group.name for group in graph.prunable}
    assert "b" in {group.name for group in graph.prunable}
    assert_exact(graph, x)


def test_shape_changed_in_place():
    def body(h):
        return h.transpose_(1, 2).transpose_(1, 2).unsqueeze_(0).squeeze_(0)

    x = image()
    graph = settled(Net(body), x)
    assert {group.name for group in graph.prunable} == {"a", "b"}
    assert_exact(graph, x)


def test_resized_output_argument():
    def body(h):
        y = torch.empty(0, device=h.device, dtype=h.dtype)
        torch.cat([h, h], 1, out=y)
        return y[:, : h.shape[1]]

    x = image()
    assert_exact(settled(Net(body), x), x)


def test_autocast_does_not_serve_casts_of_old_weights():
    net = randomise(Net(lambda h: h)).eval()
    x = torch.randn(2, 3, 8, 8)
    graph = trace(net, x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = net(x)
        graph.compact(random_keep(graph))
        inside = net(x)
        torch.clear_autocast_cache()
        assert torch.equal(inside, net(x)) and not torch.equal(inside, dense)


def test_input_worked_on_in_place_is_a_copy():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(lambda h: h)

        def forward(self, x):
            return self.net(x.sub_(0.5).mul_(2))

    x, y = torch.rand(16, 3, 8, 8), torch.randint(4, (16,))
    before = x.clone()
    model = stamp_fast.prune(randomise(Centred()), [(x, y)], steps=2, seed=0, progress=False)
    assert torch.equal(x, before)
    assert stamp_fast.report(model).equality_error < 1e-5


@dataclass(slots=True)
class Output:
    logits: torch.Tensor
    features: torch.Tensor


def test_outputs_in_slots_are_outputs():
    class Features(Net):
        def forward(self, x):
            h = torch.relu(self.a(x))
            return Output(super().forward(x), h)

    graph = trace(Features(lambda h: h), torch.randn(2, 3, 8, 8))
    assert "a" in {group.name for group in graph.frozen}


@pytest.mark.parametrize("validates", [False, True])
def test_distributions(validates):
    class Gaussian(Net):
        def forward(self, x):
            mean, spread = super().forward(x).chunk(2, 1)
            return torch.distributions.Normal(mean, spread.exp())

    before = torch.distributions.Distribution._validate_args
    torch.distributions.Distribution.set_default_validate_args(validates)
    try:
        x = image()
        graph = settled(Gaussian(lambda h: h), x)
        assert {group.name for group in graph.prunable} == {"a", "b"}
        keep = random_keep(graph)
        expected = masked_output(graph, keep, x)
        graph.compact(keep)
        found = graph.output(x)
        assert relative_error(found.mean, expected.mean) < 1e-9
        assert relative_error(found.stddev, expected.stddev) < 1e-9
        assert torch.distributions.Distribution._validate_args == validates
    finally:
        torch.distributions.Distribution.set_default_validate_args(before)


def test_nested_optimizer_state_is_refused():
    net = Net(lambda h: h)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    optimizer.state[net.a.weight]["slow"] = {"w": net.a.weight.detach().clone()}
    graph = trace(net, torch.randn(2, 3, 8, 8))
    with pytest.raises(ArgumentError, match="slow.*a.weight"):
        graph.compact(random_keep(graph), optimizer=optimizer)
    assert net.a.weight.shape == (16, 3, 3, 3)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ["stamp", "taylor"])
def test_activation_checkpointing(method, reentrant):
    net = Net(lambda h: h)
    net.body = lambda h: checkpoint(nn.functional.relu, h, use_reentrant=reentrant)
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    stamp_fast.prune(net, [batch], method=method, steps=3, seed=0, progress=False)


@pytest.mark.parametrize("method", ["stamp", "taylor", "magnitude", "random"])
def test_default_dtype_of_the_caller(method):
    torch.set_default_dtype(torch.float64)
    try:
        batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
        stamp_fast.prune(Net(lambda h: h), [batch], method=method, steps=2, seed=0, progress=False)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_difference_is_an_error_and_undone(monkeypatch):
    net = randomise(Net(lambda h: h))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    monkeypatch.setattr(
        "stamp_fast.graph.graph.ChannelGraph.output",
        lambda graph, inputs: net.head(torch.ones(8, 8)[:, : net.head.in_features]),
    )
    with pytest.raises(CompactionError, match="differs"):
        stamp_fast.prune(net, [batch], method="magnitude", progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


def test_random_forward_is_not_compared():
    net = Net(lambda h: nn.functional.dropout(h, 0.5, True))
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    report = stamp_fast.report(stamp_fast.prune(net, [batch], method="magnitude", progress=False))
    assert report.equality_error is None and any("random" in note for note in report.notes)


def test_second_input_without_a_batch():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net(lambda h: h)

        def forward(self, x, scale):
            return self.net(x * scale)

    graph = trace(Scaled(), (torch.randn(5, 3, 8, 8), torch.randn(3, 1, 1)))
    assert {group.name for group in graph.prunable} == {"net.a", "net.b"}


def test_value_hidden_from_the_trace_is_an_error_of_prune():
    net = randomise(Net(lambda h: h * h.new_tensor(h.shape[1])))
    batch = torch.randn(8, 3, 8, 8), torch.randint(4, (8,))
    with pytest.raises(CompactionError, match="differs"):
        stamp_fast.prune(net, [batch], method="magnitude", progress=False)
