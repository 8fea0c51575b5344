import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import stamp_fast
from stamp_fast import (
    ArgumentError,
    Budget,
    BudgetError,
    CheckpointError,
    CompactionError,
    LoaderError,
    _work,
    layer_costs,
    prune,
    report,
    trace,
)
from stamp_fast._work import Work
from stamp_fast.budget import meet, steps_of
from stamp_fast.data import cross_entropy
from stamp_fast.graph import ChannelGraph
from stamp_fast.graph._align import base_name
from stamp_fast.layer_costs import LayerCosts, priced
from stamp_fast.methods import Ranking
from stamp_fast.report import StepCost, build

BATCH = torch.randn(4, 3, 12, 12), torch.randint(0, 10, (4,))


class Network(nn.Module):
    """A convolution that stays whole, two that can be cut, and a skip."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.a = nn.Conv2d(width, width, 3, padding=1)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.b(F.relu(self.a(x)))
        return self.head(self.drop(x.mean((2, 3))))


def graph_of(width: int = 32) -> ChannelGraph:
    torch.manual_seed(0)
    graph = trace(Network(width), BATCH[0])
    graph.settle()
    return graph


def milliseconds(op, overhead: float = 0.0) -> float:
    """What an operator takes on a machine that there is not."""
    name = base_name(str(op.func))
    tensors = [a for a in op.args if isinstance(a, torch.Tensor)]
    if name.startswith("convolution"):
        weight = tensors[2 if name.endswith("backward") else 1]
        return overhead + 1e-5 * weight.numel() * 144 * (2 if name.endswith("backward") else 1)
    return overhead + 1e-4 * sum(t.numel() for t in tensors)


@pytest.fixture
def machine(monkeypatch):
    """Operators take what `milliseconds` says, and whole networks as long as their operators and `machine["idle"]`."""
    settings = {"overhead": 0.0, "idle": 0.0, "recorded": 0, "slower": 1.0}
    real = Work.recorded

    def recorded(self):
        record = real(self)
        settings["recorded"] += 1
        for op in record.operators:
            op.seconds = milliseconds(op, settings["overhead"]) / 1000
        return record

    def seconds(self):
        whole = self.plan.keep.all()
        return settings["idle"] / 1000 + sum(op.seconds for op in recorded(self).operators) * (
            1 if whole else settings["slower"]
        )

    monkeypatch.setattr(Work, "recorded", recorded)
    monkeypatch.setattr(Work, "seconds", seconds)
    monkeypatch.setattr(_work, "_SECONDS", 0.0)
    monkeypatch.setattr(layer_costs, "_multiple", lambda records, device: 1)
    monkeypatch.setenv("STAMP_FAST_CACHE", "")
    return settings


def uniform(graph: ChannelGraph, share: float) -> torch.Tensor:
    keep = graph.all_kept()
    for group in graph.prunable:
        keep[group.classes.start + round(share * group.num_classes) : group.classes.stop] = False
    return keep


def truth(graph: ChannelGraph, keep: torch.Tensor, training: bool = True) -> float:
    work = Work(graph.plan(keep), BATCH if training else BATCH[0], cross_entropy if training else None)
    work.seconds()  # the first makes the momentum
    return 1000 * work.seconds()


@pytest.mark.parametrize("unit", ["train_step", "latency"])
def test_networks_of_the_measured_widths_are_predicted_exactly(machine, unit):
    graph = graph_of()
    costs = LayerCosts(graph, BATCH)
    for share in (1.0, 0.5, 0.75):
        keep = uniform(graph, share)
        assert getattr(costs, unit)(keep) == pytest.approx(truth(graph, keep, unit == "train_step"), rel=1e-4)


def test_others_are_predicted_nearly(machine):
    graph = graph_of()
    costs = LayerCosts(graph, BATCH, units=("train_step",))
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        keep = graph.all_kept()
        for group in graph.prunable:
            left = int(torch.randint(3, 32, (), generator=draw))
            keep[group.classes.start + left : group.classes.stop] = False
        assert costs.train_step(keep) == pytest.approx(truth(graph, keep), rel=0.1)


def test_every_operator_belongs_to_a_layer():
    graph = graph_of(16)
    record = Work(graph.plan(graph.all_kept()), BATCH, cross_entropy).recorded()
    found: dict[int, list[str]] = {}
    for op in record.operators:
        found.setdefault(op.layer, []).append(base_name(str(op.func)))
    assert record.layers == 4
    for layer in range(3):
        assert "convolution" in found[layer] and "convolution_backward" in found[layer]
    assert "native_batch_norm_backward" in found[0] and "threshold_backward" in found[0]  # of stem's output
    assert "native_batch_norm_backward" not in found[1]
    assert {"addmm", "mm", "nll_loss_backward"} <= {*found[3]}
    assert "add_" in found[-1] or any("foreach" in name for name in found[-1])  # the optimizer


@pytest.mark.parametrize("unit, ask", [("train_step", 0.5), ("latency", 0.4), ("train_step", 0.3)])
@pytest.mark.parametrize("idle", [0.0, 2.0])
def test_a_budget_is_met_even_where_the_table_is_wrong(machine, unit, ask, idle):
    graph = graph_of()
    graph.cost_table = LayerCosts(graph, BATCH, units=(unit,))
    machine["idle"] = idle  # what no operator tells
    scores, budget = torch.rand(graph.num_classes), Budget(**{unit: ask})
    keep = meet(graph, budget, lambda b: graph.select(scores, b), "key")
    training = unit == "train_step"
    found = truth(graph, keep, training) / truth(graph, graph.all_kept(), training)
    assert found == pytest.approx(ask, rel=0.05)


def test_what_was_answered_once_is_answered_the_same(machine):
    graph = graph_of()
    graph.cost_table = LayerCosts(graph, BATCH, units=("train_step",))
    scores, budget = torch.rand(graph.num_classes), Budget(train_step=0.5)
    first = meet(graph, budget, lambda b: graph.select(scores, b), "a")
    assert meet(graph, budget, lambda b: graph.all_kept(), "a").equal(first)
    assert meet(graph, budget, lambda b: graph.all_kept(), "b").all()
    assert meet(graph, Budget(train_step=0.6), lambda b: graph.all_kept(), "a").all()


@pytest.mark.parametrize("method", ["taylor", "stamp"])
def test_memory_is_what_a_step_of_the_smaller_network_allocates(machine, method):
    torch.manual_seed(0)
    model = Network()
    loader = [BATCH] * 3
    before = _peak(model)
    prune(model, loader, budget=Budget(memory=0.6), method=method, steps=4, progress=False)
    assert _peak(model) / before == pytest.approx(0.6, rel=0.05)


def _peak(model: nn.Module) -> int:
    graph = trace(model, BATCH[0])
    return Work(graph.plan(graph.all_kept()), BATCH, cross_entropy).peak_bytes()


def test_amounts_are_of_the_dense_network_measured(machine):
    graph = graph_of()
    dense = truth(graph, graph.all_kept())
    model = Network()
    options = {"method": "magnitude", "progress": False, "force": True}  # what it really takes is not at stake
    prune(model, [BATCH] * 2, budget=Budget(train_step=f"{dense / 2:.6f} ms"), **options)
    smaller = trace(model, BATCH[0])
    assert truth(smaller, smaller.all_kept()) == pytest.approx(dense / 2, rel=0.06)
    with pytest.raises(BudgetError, match=r"latency='5 s'.*is met as it is: the dense network takes .* s$"):
        prune(Network(), [BATCH], budget=Budget(latency="5 s"), method="magnitude", progress=False)


@pytest.mark.parametrize(
    "unit, text, amount",
    [
        *[("train_step", "250 ms", 250), ("latency", "1.5s", 1500), ("latency", " 20 us ", 0.02)],
        *[("memory", "4 GiB", 4 * 2**30), ("memory", "800MB", 8e8), ("memory", "1e3 kB", 1e6)],
    ],
)
def test_amounts_are_read(unit, text, amount):
    budget = Budget(**{unit: text}).in_fractions(lambda name: 2.0 * amount)
    assert budget.asked() == {unit: pytest.approx(0.5)}


@pytest.mark.parametrize(
    "unit, text", [("train_step", "250"), ("latency", "3 GiB"), ("memory", "-1 GB"), ("memory", "0 B")]
)
def test_amounts_that_cannot_be_are_refused(unit, text):
    with pytest.raises(ArgumentError, match=f"{unit}='{text}' is no amount above 0 in one of .*, such as '"):
        Budget(**{unit: text})
    with pytest.raises(ArgumentError, match="macs must be a fraction"):
        Budget(macs="3 G")


def test_the_network_is_left_as_it_was():
    graph = graph_of(16)
    model = graph.model.train()
    model.norm.eval()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    model.a.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random, objects = torch.get_rng_state(), dict(model.named_parameters())
    costs = LayerCosts(graph, BATCH)
    for unit in costs.units:
        assert costs.share(unit, uniform(graph, 0.5)) > 0 and costs.dense(unit) > 0
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert random.equal(torch.get_rng_state())
    assert dict(model.named_parameters()) == objects and not model.a.weight.requires_grad
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert model.training and not model.norm.training


def test_levels_are_measured_once(machine, tmp_path):
    path = tmp_path / "costs.jsonl"
    first = LayerCosts(graph_of(), BATCH, units=("train_step",), path=path)
    machine["recorded"] = 0
    again = LayerCosts(graph_of(), BATCH, units=("train_step",), path=path)
    assert machine["recorded"] == 1  # to know the operators
    keep = uniform(again.graph, 0.6)
    assert again.train_step(keep) == first.train_step(keep)
    machine["recorded"] = 0
    larger = BATCH[0].repeat(2, 1, 1, 1), BATCH[1].repeat(2)
    LayerCosts(graph_of(), larger, units=("train_step",), path=path)
    assert machine["recorded"] > 5
    whole = json.loads(path.read_text().splitlines()[0])
    for line in ({"something": "else"}, 5, whole | {"multiple": None}, whole | {"rows": {"train_step": [{}]}}):
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(CheckpointError, match="is not a file of costs"):
            LayerCosts(graph_of(), BATCH, units=("train_step",), path=path)


@pytest.mark.parametrize("period", [1, 8, 16])
def test_widths_that_kernels_like_are_found(monkeypatch, period):
    def seconds_per_size(operator, width, device):
        return (-(-width // period) * period) ** 2 / width**2

    monkeypatch.setattr(layer_costs, "_per_size", seconds_per_size)
    graph = graph_of(128)
    record = Work(graph.plan(graph.all_kept()), BATCH, cross_entropy).recorded()
    assert layer_costs._multiple([record], graph.device) == period


def test_convolutions_of_other_widths_can_be_timed():
    graph = graph_of(128)
    record = Work(graph.plan(graph.all_kept()), BATCH, cross_entropy).recorded()
    assert layer_costs._multiple([record], graph.device) in (1, 8, 16, 32, 64)
    narrow = graph_of(8)
    record = Work(narrow.plan(narrow.all_kept()), BATCH, cross_entropy).recorded()
    assert layer_costs._multiple([record], narrow.device) == 1


def test_widths_of_narrow_groups_are_rounded_to_less():
    graph = graph_of(64)
    assert set(steps_of(graph, 64).values()) == {16}
    assert set(steps_of(graph, 8).values()) == {8}
    keep = graph.select(torch.rand(graph.num_classes), Budget(macs=0.5), round_to=steps_of(graph, 16), exact=False)
    assert all(int(keep[group.classes].sum()) % 16 == 0 for group in graph.prunable)


def test_rounded_widths_put_no_budget_out_of_reach(machine, monkeypatch):
    monkeypatch.setattr(layer_costs, "_multiple", lambda records, device: 16)
    graph = graph_of(64)
    priced(graph, Budget(train_step=0.5), None, BATCH, cross_entropy, BATCH[0])
    least = [graph.train_step(uniform(graph, width / 64)) / graph.train_step() for width in (16, 8)]
    assert least[1] < 0.6 * least[0]
    for ask, step in ((0.6, 16), (1.01 * least[0], 16), (0.99 * least[0], 8), (0.99 * least[1], 4)):
        fractions, steps = priced(graph, Budget(train_step=ask), None, BATCH, cross_entropy, BATCH[0])
        assert set(steps.values()) == {step}
        keep = graph.select(torch.rand(graph.num_classes), fractions, round_to=steps)
        assert graph.train_step(keep) / graph.train_step() <= 1.02 * ask


def test_noise_among_the_levels_only_adds():
    widths = torch.tensor([1.0, 0.25, 0.25, 0.25, 0.01, 0.01])[:, None]
    curve = layer_costs._Curves(widths, torch.tensor([[10.0], [3.0], [7.0], [4.0], [50.0], [1.0]]))
    for share, cost in ((1.0, 10.0), (0.25, 3.0), (0.01, 1.0)):
        assert float(curve.fraction(torch.tensor([share]))) == pytest.approx(cost / 10)


def test_memory_alone_is_neither_timed_nor_rounded_for(monkeypatch):
    monkeypatch.setattr(layer_costs, "_multiple", lambda records, device: pytest.fail("was timed"))
    monkeypatch.setenv("STAMP_FAST_CACHE", "")
    widths = []
    for _ in range(2):
        torch.manual_seed(0)
        options = {"method": "taylor", "seed": 0, "verify": False, "progress": False}
        model = prune(Network(64), [BATCH] * 2, budget=Budget(memory=0.5), **options)
        widths.append([p.shape for p in model.parameters()])
    assert widths[0] == widths[1]


def test_convolutions_are_timed_on_numbers_of_their_own():
    graph = graph_of(64)
    record = Work(graph.plan(graph.all_kept()), BATCH, cross_entropy).recorded()
    before = torch.get_rng_state()
    layer_costs._multiple([record], graph.device)
    assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize("unit", ["train_step", "memory"])
def test_widths_that_the_network_cannot_run_at_are_left_out(machine, unit):
    class Narrow(Network):
        least = 10

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.a.weight.shape[0] < self.least:
                raise ValueError("too narrow for me")
            return super().forward(x)

    model = Narrow()
    prune(model, [BATCH] * 2, budget=Budget(**{unit: 0.8}), method="magnitude", progress=False, force=True)
    assert 10 <= model.a.out_channels < 32
    model = Narrow()
    graph = trace(model, BATCH[0])
    costs = LayerCosts(graph, BATCH, units=(unit,))
    with pytest.raises(CompactionError, match="as narrow as the budget asks: .*too narrow for me.*keep="):
        costs.share(unit, uniform(graph, 0.1))
    model.least = 32
    with pytest.raises(CompactionError, match="runs at its full width, but not .* too narrow for me.*keep="):
        LayerCosts(trace(model, BATCH[0]), BATCH, units=(unit,))


@pytest.mark.parametrize("unit", ["train_step", "latency", "memory"])
def test_a_forward_may_work_on_its_batch_in_place(unit, monkeypatch):
    monkeypatch.setenv("STAMP_FAST_CACHE", "")

    class InPlace(Network):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(100.0))

    batch = (torch.rand(4, 3, 12, 12), BATCH[1], ["a", "b", "c", "d"], None)
    options = {"loss_fn": lambda m, b: cross_entropy(m, b[:2]), "method": "magnitude", "force": True}
    prune(InPlace(), [batch] * 2, budget=Budget(**{unit: 0.8}), progress=False, **options)


def test_amounts_that_hold_anyway_do_not_hinder_others(machine):
    model = Network()
    prune(model, [BATCH] * 2, budget=Budget(macs=0.5, memory="1e6 kB"), method="magnitude", progress=False)
    assert report(model).macs_after / report(model).macs_before == pytest.approx(0.5, rel=0.02)
    assert "another one is tighter" in str(report(model))
    with pytest.raises(BudgetError, match="memory='1e6 kB'.*is met as it is: the dense network takes .* kB$"):
        prune(Network(), [BATCH] * 2, budget=Budget(memory="1e6 kB"), method="magnitude", progress=False)


def test_a_promise_of_latency_is_of_the_example(machine, monkeypatch):
    seen = []
    monkeypatch.setattr(build, "compare_forwards", lambda models, inputs, *time: seen.append(inputs) or [2.0, 1.0])
    monkeypatch.setattr(build, "inputs_given", lambda model, loss_fn, batch: batch[0])
    example = torch.randn(1, 3, 12, 12)
    options = {"method": "magnitude", "progress": False, "force": True, "verify": False}
    prune(Network(), [BATCH] * 2, budget=Budget(latency=0.7), example=example, **options)
    prune(Network(), [BATCH] * 2, budget=Budget(macs=0.7), example=example, **options)
    assert [len(inputs) for inputs in seen] == [1, 4]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_of_ones_own_in_any_dtype(machine, dtype):
    def method(request):
        scores = torch.rand(request.graph.num_classes, dtype=dtype, requires_grad=True)
        return Ranking(scores, "global")

    prune(Network(), [BATCH] * 2, budget=Budget(train_step=0.7), method=method, progress=False, force=True)


def test_a_network_that_would_not_be_faster_is_refused_unless_forced(machine, monkeypatch):
    costs = [StepCost(1.0, 100, {"a": 1.0}, 9), StepCost(1.2, 80, {"a": 1.2}, 9)]
    monkeypatch.setattr(build, "compare_steps", lambda *arguments: costs)  # measured after the cut
    torch.manual_seed(0)
    model = Network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    arguments = {"budget": Budget(train_step=0.8), "method": "magnitude", "progress": False}
    with pytest.raises(BudgetError, match=r"would not be faster: it takes .* times as long .*; .*force=True"):
        prune(model, [BATCH] * 2, **arguments)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    prune(model, [BATCH] * 2, force=True, **arguments)
    assert model.a.out_channels < 32


def test_out_of_reach_says_where_the_time_goes(machine):
    machine["overhead"] = 5.0
    with pytest.raises(BudgetError, match=r"out of reach.*train_step: .* operators take however narrow they are"):
        prune(Network(), [BATCH] * 2, budget=Budget(train_step=0.05), method="magnitude", progress=False)
    machine["overhead"] = 0.0
    kept = ["stem"]
    with pytest.raises(BudgetError, match=r"out of reach.*in layers that cannot be pruned: 'stem'.*In the way: 'stem'"):
        prune(Network(), [BATCH] * 2, budget=Budget(train_step=0.05), method="magnitude", keep=kept, progress=False)


def test_several_units_hold_at_once(machine):
    graph = graph_of()
    graph.cost_table = LayerCosts(graph, BATCH, units=("train_step", "memory"))
    budget, scores = Budget(train_step=0.5, memory=0.9, macs=0.9), torch.rand(graph.num_classes)
    keep = meet(graph, budget, lambda b: graph.select(scores, b), 0)
    assert graph.cost_table.share("train_step", keep) == pytest.approx(0.5, rel=0.05)
    assert graph.cost_table.share("memory", keep) <= 0.95
    tight = Budget(train_step=0.9, macs=0.2)
    keep = meet(graph, tight, lambda b: graph.select(scores, b), 1)
    assert graph.macs(keep) / graph.macs() == pytest.approx(0.2, rel=0.02)  # the time of that is less than was asked


def test_frozen_networks_and_losses_of_training_mode_are_measured():
    graph = graph_of(16)
    graph.model.requires_grad_(False)
    assert LayerCosts(graph, BATCH, units=("memory",)).memory(graph.all_kept()) > 0

    def loss(model, batch):
        assert model.training
        return cross_entropy(model, batch)

    LayerCosts(graph_of(16), BATCH, loss, units=("train_step",))
    with pytest.raises(LoaderError, match="targets .* do not fit the model's output"):
        LayerCosts(graph_of(16), (BATCH[0], BATCH[1].repeat(2)), units=("train_step",))
    with pytest.raises(ArgumentError, match="units"):
        LayerCosts(graph_of(16), BATCH, units=("macs",))


def test_a_budget_without_costs_says_what_is_missing():
    graph = graph_of(16)
    with pytest.raises(ArgumentError, match=r"Budget\(memory=\): needs measured costs.*LayerCosts"):
        graph.select(torch.rand(graph.num_classes), Budget(memory=0.5))
    graph.cost_table = LayerCosts(graph, BATCH, units=("memory",))
    with pytest.raises(ArgumentError, match="latency: was not measured"):
        graph.select(torch.rand(graph.num_classes), Budget(latency=0.5))
    with pytest.raises(ArgumentError, match="an early cut has no measured costs"):
        optimizer = torch.optim.SGD(graph.model.parameters(), 0.1)
        stamp_fast.early.EarlyPruner(graph.model, optimizer, BATCH[0], budget=Budget(train_step=0.5))


def test_amounts_are_selected_by_prediction():
    graph = graph_of()
    graph.cost_table = LayerCosts(graph, BATCH, units=("memory",))
    scores = torch.rand(graph.num_classes)
    amount = graph.select(scores, Budget(memory=f"{0.7 * graph.memory():.0f} B"))
    assert torch.equal(amount, graph.select(scores, Budget(memory=0.7)))
    with pytest.raises(BudgetError, match="memory='1 GB'.*is met as it is"):
        graph.select(scores, Budget(memory="1 GB"))


@pytest.mark.parametrize("unit", ["train_step", "memory"])
def test_expected_costs_grow_with_every_probability(machine, unit):
    graph = graph_of()
    costs = LayerCosts(graph, BATCH, units=(unit,))
    assert float(costs.soft(unit)(torch.ones(graph.num_classes))) == pytest.approx(1.0)
    p = torch.full((graph.num_classes,), 0.6, requires_grad=True)
    cost = costs.soft(unit)(p)
    cost.backward()
    assert 0 < cost.item() < 1 and bool((p.grad > 0).all())
    keep = uniform(graph, 0.5)
    assert float(costs.soft(unit)(keep.float())) == pytest.approx(
        getattr(costs, unit)(keep) / getattr(graph_with(costs), unit)()
    )


def graph_with(costs: LayerCosts) -> ChannelGraph:
    costs.graph.cost_table = costs
    return costs.graph


def test_a_damaged_cache_is_not_used(machine, tmp_path, monkeypatch):
    monkeypatch.setenv("STAMP_FAST_CACHE", str(tmp_path / "cache"))
    arguments = {"budget": Budget(memory=0.7), "method": "magnitude", "progress": False}
    prune(Network(), [BATCH] * 2, **arguments)
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text('{"something": "else"}\n')
    model = Network()
    with pytest.warns(UserWarning, match=r"costs.jsonl.* is not a file of costs.*STAMP_FAST_CACHE"):
        prune(model, [BATCH] * 2, **arguments)
    assert model.a.out_channels < 32 and file.read_text() == '{"something": "else"}\n'
    monkeypatch.setenv("STAMP_FAST_CACHE", str(file))  # no folder
    prune(Network(), [BATCH] * 2, **arguments)


@pytest.mark.parametrize("asked, text", [(0.5, "differ by that much"), (0.3, "nearest that was found; with a tenth")])
def test_misses_are_explained(machine, asked, text):
    graph = graph_of()
    costs = LayerCosts(graph, BATCH, units=("train_step",))
    keep = graph.select(torch.rand(graph.num_classes), Budget(macs=0.46))
    assert text in costs.why_missed("train_step", keep, asked)
    assert "what goes at a time" in costs.why_missed("train_step", keep, 0.9)
