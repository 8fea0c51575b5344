"""MACs of an example: what PyTorch counts at batch one, also where an operator's work does not grow with the batch."""

import pytest
import torch
from reference.masked import counted_macs
from torch import Tensor, nn
from torch.nn import functional as F

from stamp_fast import trace


class LowRank(nn.Module):
    """A weight that is a product."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 8)
        self.u, self.v = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, 16))
        self.middle, self.head = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.linear(torch.relu(self.middle(self.first(x))), self.u @ self.v))


class Generated(nn.Module):
    """A kernel made by another layer from an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.make = nn.Parameter(torch.randn(1, 5)), nn.Linear(5, 6 * 3 * 9)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.conv2d(x, self.make(self.code).view(6, 3, 3, 3), padding=1))


class Positions(nn.Module):
    """A table of positions through layers of its own, and two rows of it, as many as the trace has examples."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.embed = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 10)
        self.two, self.mix = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, 10)
        self.body, self.head = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        where = self.embed(self.table) + self.embed(torch.arange(28.0).view(7, 4))
        return self.head(self.body(x) + where + self.mix(self.two).mean(0))


class Recurrent(nn.Module):
    """An initial state of zeros that is as long as the batch, made from nothing or from a parameter."""

    def __init__(self, from_parameter: bool) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.from_parameter = from_parameter

    def forward(self, x: Tensor) -> Tensor:
        size = (x.shape[0], 10)
        h = self.head.weight.new_zeros(size) if self.from_parameter else torch.zeros(size, device=x.device)
        for t in range(3):
            h = torch.tanh(self.inner(x[:, t]) + self.outer(h))
        return self.head(h)


class Query(nn.Module):
    """A learned token, repeated for every example before, or after, it meets its layer."""

    def __init__(self, repeat_first: bool) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.q, self.kv, self.head = nn.Linear(8, 12), nn.Linear(6, 12), nn.Linear(12, 3)
        self.repeat_first = repeat_first

    def forward(self, x: Tensor) -> Tensor:
        if self.repeat_first:
            q = self.q(self.token.expand(x.shape[0], -1, -1))
        else:
            q = self.q(self.token).repeat(x.shape[0], 1, 1)
        k = self.kv(x)
        return self.head(torch.softmax(q @ k.transpose(1, 2), -1) @ k)


class TwoInputs(nn.Module):
    """An input that is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.side, self.head = nn.Linear(6, 10), nn.Linear(5, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        return self.head(torch.relu(self.body(x) @ self.side(table).t() @ self.side(table)))


CASES = {
    "low rank": (LowRank, (3, 12)),
    "generated": (Generated, (3, 3, 8, 8)),
    "positions": (Positions, (3, 7, 6)),
    "state from nothing": (lambda: Recurrent(False), (3, 3, 6)),
    "state of a parameter's kind": (lambda: Recurrent(True), (3, 3, 6)),
    "query repeated first": (lambda: Query(True), (3, 7, 6)),
    "query repeated last": (lambda: Query(False), (3, 7, 6)),
}


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_macs_are_those_of_one_example(name, size):
    make, shape = CASES[name]
    # Of a parameter's view PyTorch's counter wants a gradient function that no_grad does not make.
    model, x = make().requires_grad_(False), torch.randn(size, *shape[1:])
    graph = trace(model, x)
    assert graph.macs() == counted_macs(model, x[:1])
    assert graph.macs(graph.all_kept()) == graph.macs()


def test_inputs_without_a_batch():
    model, x, table = TwoInputs(), torch.randn(3, 6), torch.randn(9, 5)
    assert trace(model, (x, table)).macs() == counted_macs(model, x[:1], table)


@pytest.mark.parametrize("name", ["low rank", "query repeated last", "positions"])
def test_macs_of_what_is_left(name):
    make, shape = CASES[name]
    model, x = make().requires_grad_(False), torch.randn(shape)
    graph = trace(model, x)
    graph.settle()
    keep = graph.all_kept()
    for group in graph.prunable:
        keep[group.classes.start : group.classes.start + group.num_classes // 2] = False
    assert not keep.all()
    predicted = graph.macs(keep)
    graph.compact(keep)
    assert predicted == counted_macs(model, x[:1])


def test_macs_by_hand():
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.u, self.v = nn.Parameter(torch.randn(16, 4)), nn.Parameter(torch.randn(4, 16))
            self.first = nn.Linear(8, 16)
            self.last = nn.Linear(16, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.linear(self.first(x), self.u @ self.v))

    assert trace(Product(), torch.randn(5, 8)).macs() == 8 * 16 + 16 * 4 * 16 + 16 * 16 + 16 * 12
