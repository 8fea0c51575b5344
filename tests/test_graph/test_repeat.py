"""Pruning again and again on one captured graph."""

import pytest
import torch
from torch import nn

import stamp_fast
from stamp_fast import Budget, importance, trace
from stamp_fast.errors import ArgumentError
from stamp_fast.graph import _record
from stamp_fast.graph._verify import difference, masked_output
from tests.reference.randomise import randomise


class Split(nn.Module):
    """Sizes in attributes: they have to follow every cut, not only the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU())
        self.width, self.rest = 8, 16
        self.left, self.right = nn.Conv2d(8, 12, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.head = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.stem(x).split([self.width, self.rest], 1)
        return self.head((self.left(a) + self.right(b)).relu().mean((2, 3)))


def literal() -> nn.Module:
    class Literal(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[2](self[1](self[0](x)).view(-1, 8 * 6 * 6))

    return Literal(nn.Conv2d(3, 64, 3, padding=1), nn.Conv2d(64, 8, 3, padding=1), nn.Linear(288, 5))


@pytest.mark.parametrize("make", [Split, literal])
def test_every_cut_is_exact_and_nothing_is_traced_again(make, monkeypatch):
    model = randomise(make()).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    graph = trace(model, x)
    graph.settle()
    reasons = {group.name: group.reason for group in graph.groups}
    for _ in range(3):
        keep = graph.select(importance.random(graph, 0), Budget(channels=0.75), ranking="local")
        expected, params, macs = masked_output(graph, keep, x), graph.params(keep), graph.macs(keep)
        graph.compact(keep)
        with monkeypatch.context() as patch:
            patch.setattr(_record, "record", lambda *args: pytest.fail("traced again"))
            graph = graph.smaller()
        assert difference(graph.output(x), expected) < 1e-12
        assert params == graph.params() == sum(p.numel() for p in model.parameters())
        again = trace(model, x)
        assert macs == graph.macs() == again.macs()
        assert {group.name: group.reason for group in graph.groups} == reasons
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in make().parameters()) / 2


def test_kept_layers_stay_kept():
    model = randomise(Split())
    graph = trace(model, torch.randn(2, 3, 6, 6))
    graph.settle()
    graph.protect(["left"])
    for _ in range(2):
        graph.compact(graph.select(importance.random(graph, 0), Budget(channels=0.8)))
        graph = graph.smaller()
    assert model.left.weight.shape[0] == 12
    assert model.stem[0].weight.shape[0] < 24


def test_a_graph_is_compacted_once():
    model = randomise(Split())
    graph = trace(model, torch.randn(2, 3, 6, 6))
    graph.settle()
    with pytest.raises(ArgumentError, match="nothing was compacted"):
        graph.smaller()
    keep = graph.select(importance.random(graph, 0), Budget(channels=0.8))
    graph.compact(keep)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"graph\.smaller\(\)"):
        graph.compact(keep)
    with pytest.raises(ArgumentError, match=r"graph\.smaller\(\)"), graph.masked(keep):
        pass
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_prune_after_prune():
    model = randomise(Split())
    loader = [(torch.randn(4, 3, 6, 6), torch.randint(5, (4,))) for _ in range(2)]
    errors = []
    for _ in range(2):
        stamp_fast.prune(model, loader, budget=Budget(macs=0.7), method="magnitude", progress=False)
        errors.append(stamp_fast.report(model).equality_error)
    assert max(errors) < 1e-4
    assert 0.45 < trace(model, loader[0][0]).macs() / trace(Split(), loader[0][0]).macs() < 0.5
