import json
import random

import pytest
import torch
from torch import nn

from benchmarks.networks import cifar_mobilenet_v2, cifar_resnet18
from stamp_fast import ArgumentError, Budget, CheckpointError, trace
from stamp_fast.cost_table import CostTable, _laid_out, _Sizes
from stamp_fast.graph import ChannelGraph

IMAGES = torch.randn(8, 3, 16, 16)


def network(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
        *(nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


def graph_of(model: nn.Module) -> ChannelGraph:
    graph = trace(model, IMAGES)
    graph.settle()
    return graph


def cut_to(graph: ChannelGraph, *widths: int) -> torch.Tensor:
    keep = graph.all_kept()
    for group, width in zip(graph.prunable, widths, strict=True):
        keep[group.classes.start + width : group.classes.stop] = False
    return keep


@pytest.fixture
def one_second_each(monkeypatch):
    """Every operator takes as many seconds as its first argument has elements, and networks as long as their parts."""
    asked = []

    def of(self, func, args, kwargs):
        asked.append((str(func), tuple(args[0].shape)))
        return float(args[0].numel())

    monkeypatch.setattr(CostTable, "_of", of)
    monkeypatch.setattr(CostTable, "measured", lambda self, *keeps: [2000 * self._sum(k) + 3000 for k in keeps])
    return asked


def test_a_latency_is_the_sum_over_the_operators_fitted_to_whole_networks(one_second_each):
    graph = graph_of(network())
    table = CostTable(graph, IMAGES)
    one_second_each.clear()
    found = table.latency(cut_to(graph, 5, 7))
    sizes = dict(one_second_each)
    assert sizes["aten.convolution.default"] == (8, 5, 16, 16)  # the last of them
    pixels = 8 * 16 * 16
    # Two convolutions, their norms and activations, the mean; the classifier's first argument is its bias.
    total = pixels * (3 + 5 + 5 + 5 + 7 + 7 + 7) + 10
    assert found == pytest.approx(1000 * (2 * total + 3))
    assert table.error == pytest.approx(0, abs=1e-9)


class Odd(nn.Module):
    """Sizes that are no sum of widths: what is left of them and what is gone are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, y = self.a(x).flatten(2), self.b(x).flatten(2)
        return (x @ y.transpose(1, 2)).flatten(1).relu().sum(1, keepdim=True)


@pytest.mark.parametrize(
    "make, affine",
    [
        (network, True),
        (lambda: cifar_mobilenet_v2(4), True),
        (lambda: cifar_resnet18((4, 8, 8, 8)).to(memory_format=torch.channels_last), True),
        (Odd, False),
    ],
)
def test_sizes_are_known_without_a_run(make, affine):
    """Held to the operators of real runs, at random widths, scattered channels among them."""
    graph = graph_of(make())
    table = CostTable(graph, IMAGES)
    found = _Sizes.learnt(graph, table._calls)
    assert (found is not None) == affine
    draw = torch.Generator().manual_seed(1)
    for _ in range(5 if affine else 0):
        keep = torch.rand(graph.num_classes, generator=draw) < 0.5
        for group in graph.groups:
            keep[group.classes.start] = True
            keep[group.classes] |= group.reason is not None
        assert list(map(_laid_out, found.at(keep))) == list(map(_laid_out, table._calls(keep)))


def test_many_predictions_run_the_network_few_times(one_second_each, monkeypatch):
    graph = graph_of(network())
    table, fresh = CostTable(graph, IMAGES), CostTable(graph, IMAGES)
    runs = []
    real = CostTable._calls
    monkeypatch.setattr(CostTable, "_calls", lambda self, keep: runs.append(1) or real(self, keep))
    monkeypatch.setattr(_Sizes, "learnt", staticmethod(lambda graph, calls: None))
    slow = [fresh.latency(cut_to(graph, width, 33 - width)) for width in range(1, 33)]
    monkeypatch.undo()
    monkeypatch.setattr(CostTable, "_of", lambda self, func, args, kwargs: float(args[0].numel()))
    monkeypatch.setattr(CostTable, "_calls", lambda self, keep: runs.append(1) or real(self, keep))
    assert len(runs) >= 30
    runs.clear()
    assert [table.latency(cut_to(graph, width, 33 - width)) for width in range(1, 33)] == slow
    assert len(runs) < 10


def test_the_network_is_left_as_it_was():
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    graph = graph_of(model)
    table = CostTable(graph, IMAGES)
    table.latency(cut_to(graph, 3, 4))
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training and all(m.training for m in model.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_size_is_measured_once(monkeypatch, tmp_path):
    from stamp_fast import cost_table

    timed = []
    times = cost_table._times

    def counted(work, device, repeats=cost_table._REPEATS):
        timed.append(work)
        return times(work, device, repeats)

    monkeypatch.setattr(cost_table, "_times", counted)
    graph = graph_of(network())
    path = tmp_path / "costs.jsonl"
    table = CostTable(graph, IMAGES, path=path)
    count = len(timed)
    table.latency(graph.all_kept())
    assert len(timed) == count
    keep = cut_to(graph, 11, 13)
    table.latency(keep)
    assert len(timed) > count
    predicted = table.latency(keep)
    timed.clear()
    again = CostTable(graph, IMAGES, path=path)
    assert again.latency(keep) == predicted and not timed  # whole networks neither
    with open(path, "a") as file:
        file.write('{"op": "aten.relu')  # as a process killed while it writes leaves it
    torn = CostTable(graph, IMAGES, path=path)
    assert torn.latency(keep) == predicted
    torn.latency(cut_to(graph, 9, 5))  # what is measured next does not go on in that line
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    elsewhere = [{**line, "machine": {**line["machine"], "threads": 99}} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in elsewhere))
    CostTable(graph, IMAGES, path=path)
    assert timed
    path.write_text("[1]\n")
    with pytest.raises(CheckpointError, match="not a table of costs"):
        CostTable(graph, IMAGES, path=path)


def test_a_network_that_waits_for_something_else_is_said_to(monkeypatch):
    monkeypatch.setattr(CostTable, "measured", lambda self, *keeps: [float(n + 1) for n in range(len(keeps))])
    monkeypatch.setattr(CostTable, "_of", lambda self, func, args, kwargs: float(args[0].numel()))
    graph = graph_of(network())
    with pytest.warns(UserWarning, match="does not grow with its operators'"):
        table = CostTable(graph, IMAGES)
    assert table.latency(cut_to(graph, 2, 2)) < table.latency(graph.all_kept())


def test_images_may_be_expanded():
    grey = torch.randn(8, 1, 16, 16).expand(-1, 3, -1, -1)
    assert CostTable(graph_of(network(8)), grey).latency(cut_to(graph_of(network(8)), 4, 4)) > 0


def test_predictions_order_networks_as_measurements_do():
    """How well they agree is the benchmark's to say: other programs share this machine."""
    graph = graph_of(network(64))
    table = CostTable(graph, IMAGES)
    narrow, wide = cut_to(graph, 8, 8), graph.all_kept()
    measured = [table.measured(narrow, wide) for _ in range(3)]
    least = [min(times) for times in zip(*measured, strict=True)]  # what else runs only adds
    assert table.latency(narrow) < table.latency(wide) and least[0] < least[1]


def test_what_cannot_be_is_refused():
    graph = graph_of(network())
    with pytest.raises(ArgumentError, match="cost_table"):
        Budget(latency=0.5).used(graph, graph.all_kept())
    with pytest.raises(ArgumentError, match="needs measured costs"):
        graph.select(torch.rand(graph.num_classes), Budget(latency=0.5))
    with pytest.raises(ArgumentError, match="inputs"):
        CostTable(graph, "images")


def test_budgets_in_time_are_fractions_of_the_table():
    graph = graph_of(network())
    graph.cost_table = CostTable(graph, IMAGES)
    keep = cut_to(graph, 4, 4)
    found = Budget(latency=0.5).used(graph, keep)
    assert found == graph.cost_table.latency(keep) / graph.cost_table.latency(graph.all_kept()) / 0.5


def test_random_networks_of_a_budget_differ():
    graph = graph_of(network())
    draw = random.Random(0)
    table = CostTable(graph, IMAGES)
    found = {table.latency(cut_to(graph, draw.randint(1, 32), draw.randint(1, 32))) for _ in range(5)}
    assert len(found) > 1
