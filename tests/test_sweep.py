import copy
import csv

import pytest
import torch
from torch import nn

from stamp_fast import ArgumentError, Budget, BudgetError, LoaderError, _work, prune, report, sweep
from stamp_fast.data import hits
from stamp_fast.sweep import Point, _fronted

LOADER = [(torch.randn(8, 3, 12, 12), torch.randint(0, 5, (8,))) for _ in range(3)]
HELD_OUT = [(torch.randn(8, 3, 12, 12), torch.randint(0, 5, (8,))) for _ in range(2)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(_work, "_SECONDS", 0.0)
    monkeypatch.setenv("STAMP_FAST_CACHE", "")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 5)),
    )


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("method", ["taylor", "bn_scale", "magnitude", "random"])
def test_every_budget_is_a_point_and_the_model_stays_whole(method):
    model = network().train()
    before, random = state_of(model), torch.get_rng_state()
    budgets = [Budget(macs=0.5), Budget(params=0.3), Budget(memory=0.7), Budget(macs=0.6, params=0.6)]
    found = sweep(model, LOADER, budgets, method=method, seed=0, progress=False)
    assert [point.budget for point in found.points] == [Budget(macs=1.0), *budgets]
    assert found.points[0].macs == found.points[0].params == found.points[0].train_step == 1
    assert found.points[1].macs == pytest.approx(0.5, rel=0.02)
    assert found.points[2].params == pytest.approx(0.3, rel=0.02)
    assert max(found.points[4].macs, found.points[4].params) == pytest.approx(0.6, rel=0.02)
    assert all(0 <= point.score <= 1 and point.train_step > 0 for point in found.points)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())
    assert random.equal(torch.get_rng_state()) and model.training
    assert all(p.grad is None for p in model.parameters())


def test_a_point_is_what_prune_would_have_made_of_it():
    model, other = network(), network()
    found = sweep(model, LOADER, [Budget(macs=0.7), Budget(macs=0.3)], held_out=HELD_OUT, seed=0, progress=False)
    assert found.pick(2, verify=False) is model
    prune(other, LOADER, budget=Budget(macs=0.3), method="taylor", seed=0, progress=False)
    assert [p.shape for p in model.parameters()] == [p.shape for p in other.parameters()]
    assert all(a.equal(b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert report(model).method == "taylor" and report(model).macs_after / report(model).macs_before < 0.31
    with pytest.raises(ArgumentError, match="pick: the model is not the one that was swept any more"):
        found.pick(1)
    # Its score is that of the network right after the cut.
    model.eval()
    with torch.no_grad():
        right = [hits(model, batch) for batch in HELD_OUT]
    assert found.points[2].score == pytest.approx(sum(n for n, _ in right) / sum(n for _, n in right), abs=1e-6)


def test_a_measured_point_is_cut_as_it_was_swept():
    model = network()
    found = sweep(model, iter(LOADER), [Budget(memory=0.6)], seed=0, progress=False)  # a generator is kept
    keep = found.points[1].keep
    found.pick(1)
    assert report(model).macs_after / report(model).macs_before == found.points[1].macs
    assert model[0].out_channels == int(keep[:32].sum())
    model = network()
    sweep(model, LOADER, [Budget(macs=0.5)], seed=0, progress=False).pick(1, round_to=8)
    assert model[0].out_channels % 8 == model[3].out_channels % 8 == 0


def test_scores_are_taken_once(monkeypatch):
    from stamp_fast import methods

    asked, real = [], methods.METHODS["magnitude"]
    monkeypatch.setitem(methods.METHODS, "magnitude", lambda request: asked.append(1) or real(request))
    found = sweep(network(), LOADER, [Budget(macs=m / 10) for m in range(2, 9)], method="magnitude", progress=False)
    found.pick(3)
    assert len(asked) == 1


def test_a_budget_that_cannot_be_met_is_a_point_too():
    found = sweep(network(), LOADER, [Budget(macs=1e-6), Budget(macs=0.5)], progress=False)
    assert "out of reach" in found.points[1].error and found.points[1].keep is None and not found.points[1].front
    assert found.points[2].macs == pytest.approx(0.5, rel=0.02)
    assert "cannot be met" in str(found) and "out of reach" in str(found)
    with pytest.raises(BudgetError, match="out of reach"):
        found.pick(1)


def test_measured_budgets_of_one_sweep_are_met_each_for_itself():
    found = sweep(network(), LOADER, [Budget(memory=0.8), Budget(memory=0.6)], progress=False)
    wide, narrow = (int(point.keep.sum()) for point in found.points[1:])
    assert narrow < wide < found.points[0].keep.numel()


def test_a_metric_of_ones_own():
    def minus_the_loss(model, batch):
        assert not model.training
        images, labels = batch
        return -nn.functional.cross_entropy(model(images), labels, reduction="sum"), len(labels)

    found = sweep(network(), LOADER, [Budget(macs=0.5)], metric=minus_the_loss, progress=False)
    assert all(point.score < 0 for point in found.points)


def test_the_front_is_what_nothing_else_beats_in_both():
    def point(step, score, error=""):
        return Point(Budget(macs=0.5), None, step, step, step, score, False, error)

    points = [
        point(1.0, 0.9),
        point(0.5, 0.8),
        point(0.6, 0.7),
        point(0.4, 0.8),
        point(0.3, 0.2),
        point(0.2, 0.9, "no"),
    ]
    assert [p.front for p in _fronted(points)] == [True, False, False, True, True, False]
    alike = [point(0.5, 0.8), point(0.5, 0.8)]
    assert [p.front for p in _fronted(alike)] == [True, True]


def test_table_file_and_plot(tmp_path):
    found = sweep(network(), LOADER, [Budget(macs=0.5), Budget(memory="5 MB"), Budget(macs=1e-6)], progress=False)
    lines = str(found).splitlines()
    assert any("macs=0.5" in line for line in lines) and any("memory=5 MB" in line for line in lines)
    rows = list(csv.DictReader(found.to_csv(tmp_path / "sweep.csv").open()))
    assert [row["budget"] for row in rows] == ["macs=1", "macs=0.5", "memory=5 MB", "macs=1e-06"]
    assert float(rows[1]["macs"]) == found.points[1].macs and rows[3]["error"] == found.points[3].error
    assert found.plot(tmp_path / "sweep.png", "A sweep").read_bytes().startswith(b"\x89PNG")


def test_what_cannot_be_is_refused():
    model = network()
    before = state_of(model)
    for budgets in ([], Budget(macs=0.5), [0.5]):
        with pytest.raises(ArgumentError, match="budgets: expected a list of Budget"):
            sweep(model, LOADER, budgets, progress=False)
    with pytest.raises(ArgumentError, match="method: must be one of taylor.*got 'stamp'"):
        sweep(model, LOADER, [Budget(macs=0.5)], method="stamp", progress=False)
    with pytest.raises(LoaderError):
        sweep(model, [], [Budget(macs=0.5)], progress=False)
    with pytest.raises(ArgumentError, match="metric: the default is for batches"):
        sweep(model, LOADER, [Budget(macs=0.5)], held_out=[torch.randn(2, 3, 12, 12)], progress=False)
    found = sweep(model, LOADER, [Budget(macs=0.5)], progress=False)
    for index in (0, 2, -1, True, "1"):
        with pytest.raises(ArgumentError, match="index: expected 1 to 1"):
            found.pick(index)
    assert all(before[name].equal(tensor) for name, tensor in model.state_dict().items())


def test_scores_of_ones_own_prune():
    """What a sweep hands to `prune` is open to all: a function in the place of a method's name."""
    from stamp_fast.methods import Ranking, Request

    def first_channels(request: Request) -> Ranking:
        scores = torch.zeros(request.graph.num_classes)
        for group in request.graph.groups:
            scores[group.classes] = -torch.arange(group.num_classes, dtype=torch.float)
        return Ranking(scores, "local")

    model = network()
    first = copy.deepcopy(model[0].weight)
    prune(model, LOADER, budget=Budget(macs=0.5), method=first_channels, progress=False)
    kept = model[0].out_channels
    assert kept < 32 and model[0].weight.equal(first[:kept])
    assert report(model).method == "first_channels"
