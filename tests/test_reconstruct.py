"""Folding: exact where what goes is a mixture of what stays, least squares elsewhere."""

import copy

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import randomise
from torch import nn

from stamp_fast import ArgumentError, Budget, importance, trace
from stamp_fast.reconstruct import reconstruct


class Redundant(nn.Module):
    """Channels 4 to 7 of the first layer are mixtures of channels 0 to 3, before and after."""

    def __init__(self, reader: nn.Module, flat: bool = False) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.reader = reader
        self.flat = flat
        mix = torch.randn(4, 4)
        with torch.no_grad():
            self.first.weight[4:] = torch.einsum("ij,jkhw->ikhw", mix, self.first.weight[:4])
            self.first.bias[4:] = mix @ self.first.bias[:4]

    def forward(self, x):
        x = self.first(x)
        return self.reader(x.mean((2, 3)) if self.flat else x)


def keep_of(graph, name: str, kept: int) -> torch.Tensor:
    keep = graph.all_kept()
    classes = next(g for g in graph.groups if g.name == name).classes
    keep[classes.start + kept : classes.stop] = False
    return keep


@pytest.mark.parametrize(
    ("reader", "flat"),
    [
        (lambda: nn.Conv2d(8, 5, 1), False),
        (lambda: nn.Conv2d(8, 5, 3, padding=1), False),
        (lambda: nn.ConvTranspose2d(8, 5, 2, stride=2), False),
        (lambda: nn.Linear(8, 5), True),
        (lambda: nn.Sequential(nn.Conv2d(8, 5, 3, stride=2, padding=1), nn.BatchNorm2d(5), nn.ReLU()), False),
    ],
    ids=["1x1", "3x3", "transposed", "linear", "strided"],
)
def test_mixtures_of_what_stays_are_folded_exactly(reader, flat):
    model = Redundant(reader(), flat).double().eval()
    x = torch.randn(16, 2, 6, 6, dtype=torch.float64)
    before = model(x)
    graph = trace(model, x)
    keep = keep_of(graph, "first", 4)
    names = reconstruct(graph, keep, x, ridge=1e-12)
    assert len(names) == 1 and names[0].startswith("reader")
    graph.compact(keep)
    assert model.first.weight.shape[0] == 4
    assert torch.allclose(model(x), before, atol=1e-6)


@pytest.mark.parametrize("network", [Plain, Residual])
def test_output_stays_closer_than_without(network):
    torch.manual_seed(1)
    x = torch.randn(64, 1, 8, 8, dtype=torch.float64)
    distances = []
    for folds in (False, True):
        model = randomise(network()).double().eval()
        before = model(x)
        graph = trace(model, x)
        keep = graph.select(importance.magnitude(graph), Budget(channels=0.7), ranking="local", exact=False)
        if folds:
            assert reconstruct(graph, keep, x)
        graph.compact(keep)
        distances.append((model(x) - before).square().mean().item())
    assert distances[1] < 0.6 * distances[0]


def test_linear_reader_against_least_squares():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    x = torch.randn(50, 3, dtype=torch.float64)
    weight = model[2].weight.detach().clone()
    hidden = model[1](model[0](x)).detach()
    graph = trace(model, x)
    keep = keep_of(graph, "0", 4)
    reconstruct(graph, keep, x, ridge=1e-13)
    wanted = torch.linalg.lstsq(hidden[:, :4], hidden @ weight.T).solution.T
    assert torch.allclose(model[2].weight[:, :4], wanted, atol=1e-6)


class Twice(nn.Module):
    """Two layers read the same channels, one of them much larger values than the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 6)
        self.one, self.other = nn.Linear(6, 4), nn.Linear(6, 5)

    def forward(self, x):
        x = self.first(x)
        return self.one(x.relu()), self.other(100 * x.tanh())


def test_readers_of_one_axis_share_the_solution():
    model = Twice().double()
    inputs = [torch.randn(20, 3, dtype=torch.float64) for _ in range(2)]
    hidden = [model.first(x).detach() for x in inputs]
    moments = []
    for read in ([h.relu() for h in hidden], [100 * h.tanh() for h in hidden]):
        moments += [second / second.diagonal().mean() for second in (h.mT @ h / len(h) for h in read)]
    second = sum(moments)
    wanted = torch.linalg.solve(second[:4, :4], second[:4, 4:]).mT
    weights = [layer.weight.detach().clone() for layer in (model.one, model.other)]
    graph = trace(model, inputs[0])
    assert reconstruct(graph, keep_of(graph, "first", 4), inputs, ridge=1e-13) == ["one.weight", "other.weight"]
    for layer, weight in zip((model.one, model.other), weights, strict=True):
        assert torch.allclose(layer.weight[:, :4], weight[:, :4] + weight[:, 4:] @ wanted, atol=1e-8)
        assert torch.equal(layer.weight[:, 4:], weight[:, 4:])


@pytest.mark.parametrize("layout", ["channels_last", "bfloat16"])
def test_other_layouts_and_dtypes(layout):
    model = randomise(Residual()).eval()
    x = torch.randn(16, 1, 8, 8)
    reference = copy.deepcopy(model)
    if layout == "bfloat16":
        model, x = model.bfloat16(), x.bfloat16()
    else:
        model = model.to(memory_format=torch.channels_last)
    graphs = trace(model, x), trace(reference, x.float())
    keep = graphs[1].select(importance.magnitude(graphs[1]), Budget(channels=0.6), ranking="local", exact=False)
    for graph in graphs:
        reconstruct(graph, keep, x.to(next(graph.model.parameters()).dtype))
    weight = model.conv2.weight
    assert layout == "bfloat16" or weight.is_contiguous(memory_format=torch.channels_last)
    tolerance = {"rtol": 0.1, "atol": 0.1} if layout == "bfloat16" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(weight.float(), reference.conv2.weight, **tolerance)


def test_dead_activations_leave_the_weights():
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4))
    with torch.no_grad():
        model[0].bias.fill_(-100)
    weight = model[2].weight.detach().clone()
    graph = trace(model, torch.randn(2, 3))
    assert reconstruct(graph, keep_of(graph, "0", 3), torch.randn(20, 3)) == []
    assert torch.equal(weight, model[2].weight)


def test_nothing_is_cut_nothing_is_changed():
    model = Plain()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    assert reconstruct(graph, graph.all_kept(), torch.randn(4, 1, 8, 8)) == []
    with pytest.raises(ArgumentError, match="keep: expected shape"):
        reconstruct(graph, torch.ones(3, dtype=torch.bool), torch.randn(4, 1, 8, 8))


@pytest.mark.parametrize("shape", [(1024, 32, 32), (64, 128, 128), (1000, 32, 32)], ids=str)
def test_rows_that_are_left_out_do_not_bias_the_solution(shape):
    """More rows than are looked at, their number a multiple of the image's width: padding is not all that is seen."""
    count, *size = shape
    model = Redundant(nn.Conv2d(8, 5, 3, padding=1)).eval()
    x = torch.randn(count, 2, *size)
    with torch.no_grad():
        before = model(x[:8])
        graph = trace(model, x[:2])
        keep = keep_of(graph, "first", 4)
        reconstruct(graph, keep, x, ridge=1e-6)
        graph.compact(keep)
        assert (model(x[:8]) - before).square().mean() < 1e-3 * before.var()
