"""A cut in mid-training: when it is made, and that everything goes on."""

import copy
import json
import math
import weakref

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from stamp_fast import ArgumentError, Budget, BudgetError, CheckpointError, CompactionError, trace
from stamp_fast.early import EarlyPruner, cut_as_in, early_pruner, indicator
from stamp_fast.graph import ChannelGraph

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(16, 3, 8, 8, generator=GENERATOR)
LABELS = torch.randint(4, (16,), generator=GENERATOR)
QUARTER = Budget(macs=0.25)
HALF_OF_ALL = Budget(channels=0.5)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.up, self.bn_up = nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24)
        self.down, self.bn_down = nn.Conv2d(24, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.bn(self.stem(x)).relu()
        x = (x + self.bn_down(self.down(self.bn_up(self.up(x)).relu()))).relu()
        return self.head(x.mean((2, 3)))


def loss(model, images=IMAGES, labels=LABELS):
    return nn.functional.cross_entropy(model(images), labels)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-4, **options})


def pruner_of(model, optimizer=None, **options):
    return EarlyPruner(model, optimizer, IMAGES[:2], **{"budget": QUARTER, "cap": 3, **options})


def epoch(pruner, optimizer, steps=2):
    for _ in range(steps):
        loss(pruner.model).backward()
        pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
    return pruner.epoch_end()


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_cut_at_the_cap(importance):
    model = Net()
    optimizer = sgd(model)
    dense = trace(model, IMAGES[:2]).macs()
    pruner = pruner_of(model, optimizer, importance=importance)
    parameters = list(model.parameters())
    assert [epoch(pruner, optimizer) for _ in range(5)] == [False, False, True, False, False]
    assert pruner.cut_epoch == 3 and pruner.done
    assert len(pruner.history) == len(pruner.indicators) == 3
    assert trace(model, IMAGES[:2]).macs() <= 0.255 * dense
    assert [p is q for p, q in zip(model.parameters(), parameters, strict=True)]
    for parameter in model.parameters():
        assert optimizer.state[parameter]["momentum_buffer"].shape == parameter.shape


def test_what_stays_is_what_the_last_sub_network_said():
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)
    while not epoch(pruner, optimizer):
        pass
    assert pruner.history[-1] == [model.stem.out_channels, model.up.out_channels]
    assert pruner.groups == ["stem", "up"]


def test_it_cuts_when_it_has_settled():
    """With a learning rate of nothing the sub-network of every epoch is the same."""
    model = Net()
    optimizer = sgd(model, lr=0.0)
    pruner = pruner_of(model, optimizer, importance="magnitude", window=2, cap=50)
    assert [epoch(pruner, optimizer) for _ in range(3)] == [False, False, True]
    assert pruner.indicators[1:] == [1.0, 1.0]


def test_it_waits_while_widths_move():
    model = Net()
    optimizer = sgd(model, lr=0.0)
    pruner = pruner_of(model, optimizer, importance="magnitude", window=2, cap=50, budget=HALF_OF_ALL)
    for number in range(6):
        with torch.no_grad():  # now one layer is the stronger one, now the other
            model.up.weight.mul_(8 if number % 2 else 1 / 8)
        assert not pruner.epoch_end()
    assert max(pruner.indicators[1:]) < pruner.tau


def test_a_ranking_by_layer_would_say_nothing(monkeypatch):
    """With the same share of every layer all sub-networks are alike, whatever the network does."""
    histories = {}
    for ranking in ("global", "local"):
        monkeypatch.setattr(early_pruner, "_RANKING", ranking)
        torch.manual_seed(0)
        model = Net()
        pruner = pruner_of(model, importance="magnitude", cap=50, budget=HALF_OF_ALL)
        for number in range(4):
            with torch.no_grad():
                model.up.weight.mul_(2 if number % 2 else 0.5)
            pruner.epoch_end()
        histories[ranking] = pruner.history
    assert all(counts == histories["local"][0] for counts in histories["local"])
    assert indicator(histories["local"]) == 1
    assert indicator(histories["global"]) < 1


def test_the_module_ranks_globally():
    assert early_pruner._RANKING == "global"


@pytest.mark.parametrize("make", [sgd, lambda model: torch.optim.AdamW(model.parameters(), 1e-2)])
def test_training_goes_on_as_in_the_masked_dense_network(make):
    model = Net().double()
    optimizer = make(model)
    images = IMAGES.double()
    pruner = EarlyPruner(model, optimizer, images[:2], budget=QUARTER, cap=1)
    loss(model, images).backward()
    pruner.observe()
    optimizer.step()
    optimizer.zero_grad()
    twin, kept = copy.deepcopy((model, optimizer)), []
    original = ChannelGraph.compact

    def noted(self, keep, *args):
        kept.append(keep)
        return original(self, keep, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ChannelGraph, "compact", noted)
        assert pruner.epoch_end()
    dense, dense_optimizer = twin
    graph = trace(dense, images[:2])
    plan = graph.plan(kept[0])
    for _ in range(3):
        with graph.masked(plan):
            expected = loss(dense, images)
            expected.backward()
        dense_optimizer.step()
        dense_optimizer.zero_grad()
        found = loss(model, images)
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_schedule_average_and_groups_go_on():
    model = Net()
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.SGD([{"params": decayed, "weight_decay": 1e-3}, {"params": others}], 0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    pruner = pruner_of(model, optimizer, ema=average)
    rates = []
    for _ in range(6):
        epoch(pruner, optimizer)
        average.update_parameters(model)
        rates.append(schedule.get_last_lr()[0])
        schedule.step()
    alone = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1)
    expected = torch.optim.lr_scheduler.CosineAnnealingLR(alone, 6)
    for rate in rates:
        assert rate == pytest.approx(expected.get_last_lr()[0])
        alone.step()
        expected.step()
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-3, 0]
    assert [p.shape for p in average.module.parameters()] == [p.shape for p in model.parameters()]
    assert torch.isfinite(average(IMAGES)).all()


def test_scaled_and_accumulated_gradients_in_channels_last():
    model = Net().to(memory_format=torch.channels_last)
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    pruner = pruner_of(model, optimizer, cap=2)
    for _ in range(4):
        for _ in range(2):
            for images, labels in zip(IMAGES.split(8), LABELS.split(8), strict=True):
                with torch.autocast("cpu", torch.bfloat16):
                    value = loss(model, images.contiguous(memory_format=torch.channels_last), labels) / 2
                scaler.scale(value).backward()
            pruner.observe(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        pruner.epoch_end()
    assert pruner.cut_epoch == 2
    assert model.up.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.isfinite(loss(model))


def test_a_compiled_model_is_compiled_once_more():
    model = Net()
    optimizer = sgd(model)
    counter = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=counter)
    pruner = pruner_of(compiled, optimizer, cap=2)
    for _ in range(4):
        epoch(pruner, optimizer)
    assert pruner.cut_epoch == 2
    assert counter.frame_count == 2


def test_gradual():
    model = Net()
    optimizer = sgd(model)
    dense = trace(model, IMAGES[:2]).macs()
    pruner = pruner_of(model, optimizer, cap=1, steps=4, every=2)
    assert epoch(pruner, optimizer)
    left = [trace(model, IMAGES[:2]).macs() / dense]
    for _ in range(6):
        loss(model).backward()
        cut = pruner.observe()
        optimizer.step()
        optimizer.zero_grad()
        if cut:
            left.append(trace(model, IMAGES[:2]).macs() / dense)
    assert pruner.done
    # 0.25 ** (step / 4), each met from below within the grain of so small a network.
    assert left == pytest.approx([0.25**0.25, 0.5, 0.25**0.75, 0.25], rel=0.1)
    assert left[-1] <= 0.255
    assert not pruner.observe()


def run_from(state, epochs_left):
    """A new program that goes on from a checkpoint."""
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)
    pruner.load_state_dict(state["pruner"])
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    for _ in range(epochs_left):
        epoch(pruner, optimizer)
    return model, pruner


@pytest.mark.parametrize("after", [1, 2, 3, 4])
def test_checkpoints_before_and_after_the_cut(after, tmp_path):
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)
    for number in range(1, 6):
        epoch(pruner, optimizer)
        if number == after:
            parts = {"model": model, "optimizer": optimizer, "pruner": pruner}
            torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint")
    again, resumed = run_from(torch.load(tmp_path / "checkpoint", weights_only=True), 5 - after)
    assert resumed.cut_epoch == pruner.cut_epoch == 3
    assert resumed.history == pruner.history
    for (name, value), other in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_a_checkpoint_in_the_middle_of_a_gradual_cut(tmp_path):
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, cap=1, steps=3, every=2)
    epoch(pruner, optimizer)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "pruner": pruner.state_dict()}
    state = copy.deepcopy(state)
    again = Net()
    other = sgd(again)
    resumed = pruner_of(again, other, cap=1, steps=3, every=2)
    resumed.load_state_dict(state["pruner"])
    again.load_state_dict(state["model"])
    other.load_state_dict(state["optimizer"])
    for _ in range(3):
        epoch(pruner, optimizer)
        epoch(resumed, other)
    assert pruner.done and resumed.done
    for value, found in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(value, found)


def test_a_state_of_another_network_is_refused():
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, cap=2)
    epoch(pruner, optimizer)
    with pytest.raises(CheckpointError, match="groups"):
        pruner_of(Net()).load_state_dict({**pruner.state_dict(), "groups": ["stem"]})
    for name, value in (("budget", HALF_OF_ALL), ("steps", 3), ("floor", 0.2), ("window", 2)):
        with pytest.raises(CheckpointError, match=f"another {name}="):
            pruner_of(Net(), **{name: value}).load_state_dict(pruner.state_dict())
    epoch(pruner, optimizer)
    with pytest.raises(CheckpointError, match="cut already"):
        pruner.load_state_dict(pruner.state_dict())
    with pytest.raises(CheckpointError, match="importance"):
        pruner_of(Net(), importance="magnitude").load_state_dict(pruner.state_dict())
    with pytest.raises(CheckpointError, match="history"):
        pruner_of(Net()).load_state_dict({})


def test_a_cut_that_fails_changes_nothing(monkeypatch):
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, cap=2)
    epoch(pruner, optimizer)
    loss(model).backward()
    pruner.observe()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    with monkeypatch.context() as patch:
        patch.setattr(early_pruner, "select_and_cut", fails)
        with pytest.raises(CompactionError, match="on purpose"):
            pruner.epoch_end()
    assert not pruner.done and pruner.cut_epoch is None and len(pruner.history) == 1
    for old, new in zip(before, (model.state_dict(), optimizer.state_dict()), strict=True):
        torch.testing.assert_close(new, old, rtol=0, atol=0)
    assert pruner.epoch_end()  # the same scores: it can be tried again


def fails(graph, ranked, budget, round_to, optimizer, **rest):
    """Cuts, and only then fails."""
    keep = graph.select(ranked.scores, budget)
    graph.compact(keep, optimizer)
    raise CompactionError("on purpose")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": 0.5}, ArgumentError, "budget"),
        ({"budget": Budget(macs=0.001)}, BudgetError, "out of reach"),
        ({"importance": "bn_scale"}, ArgumentError, "importance"),
        ({"tau": 2}, ArgumentError, "tau"),
        ({"window": 0}, ArgumentError, "window"),
        ({"cap": 0}, ArgumentError, "cap"),
        ({"steps": 0}, ArgumentError, "steps"),
        ({"every": 1.5}, ArgumentError, "every"),
        ({"keep": ["nowhere"]}, ArgumentError, "nowhere"),
        ({"floor": 2.0}, ArgumentError, "floor"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        pruner_of(Net(), **options)


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(ArgumentError, match="none of the model's parameters"):
        pruner_of(Net(), sgd(Net()))


def test_no_cap_is_warned_of():
    with pytest.warns(UserWarning, match="never pruned"):
        pruner_of(Net(), cap=None)


def test_nothing_observed():
    pruner = pruner_of(Net())
    with pytest.raises(ArgumentError, match="observe"):
        pruner.epoch_end()
    with pytest.raises(ArgumentError, match="before zero_grad"):
        pruner.observe()


def test_only_widths_are_kept_of_an_epoch():
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, cap=50)
    for _ in range(3):
        epoch(pruner, optimizer)
    assert [len(counts) for counts in pruner.history] == [2, 2, 2]


def test_the_dense_network_is_let_go():
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, cap=1)
    storage = weakref.ref(model.up.weight.untyped_storage())
    epoch(pruner, optimizer)
    assert storage() is None


def test_rounding_and_floor_hold_for_the_cut():
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer, cap=1, round_to=4, budget=Budget(macs=0.5))
    epoch(pruner, optimizer)
    assert model.up.out_channels % 4 == 0 and model.stem.out_channels % 4 == 0
    model = Net()
    with torch.no_grad():
        model.up.weight.mul_(1e-3)
    pruner = pruner_of(model, importance="magnitude", cap=1, floor=0.5, budget=HALF_OF_ALL)
    pruner.epoch_end()
    assert model.up.out_channels == 12


def test_gradients_are_those_of_the_epoch():
    """What an epoch has seen says nothing about the next."""
    histories = []
    for scale in (1.0, 1e6):
        model = Net()
        pruner = pruner_of(model, cap=50, budget=HALF_OF_ALL)
        torch.manual_seed(0)
        for number in range(2):
            loss(model).backward()
            if number == 0:
                model.bn_up.weight.grad *= scale
            pruner.observe()
            model.zero_grad()
            pruner.epoch_end()
        histories.append(pruner.history)
    assert histories[0][0] != histories[1][0]
    assert histories[0][1] == histories[1][1]


def test_a_group_without_gradients_is_named():
    model = Net()
    pruner = pruner_of(model)
    loss(model).backward()
    for module in (model.up, model.bn_up):
        for parameter in module.parameters():
            parameter.grad.zero_()
    pruner.observe()
    with pytest.raises(ArgumentError, match="'up' had no gradient"):
        pruner.epoch_end()


def test_gradients_that_are_all_infinite_are_told_from_none():
    model = Net()
    pruner = pruner_of(model)
    loss(model).backward()
    model.bn.weight.grad.fill_(float("inf"))
    pruner.observe()
    with pytest.raises(ArgumentError, match="all 1 steps observed are NaN or inf"):
        pruner.epoch_end()


def test_a_state_is_a_copy_that_json_can_hold():
    model = Net()
    optimizer = sgd(model)
    pruner = pruner_of(model, optimizer)
    epoch(pruner, optimizer)
    state = pruner.state_dict()
    text = json.dumps(state, allow_nan=False)
    epoch(pruner, optimizer)
    assert json.dumps(state, allow_nan=False) == text
    again = pruner_of(Net())
    again.load_state_dict(json.loads(text))
    assert math.isnan(again.indicators[0])


@pytest.mark.parametrize("dense", [True, False])
def test_a_network_that_could_not_be_cut_once_more(dense):
    """Only one of four channels is left, as the budget asks of the dense network."""

    def network():
        torch.manual_seed(0)
        layers = (nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return nn.Sequential(*layers, nn.Linear(4, 4))

    model = network()
    optimizer, average = sgd(model), copy.deepcopy(model)
    pruner = pruner_of(model, optimizer, cap=1, ema=average)
    epoch(pruner, optimizer)
    assert model[0].out_channels == 1
    state = pruner.state_dict()
    again, other = network(), network()
    if not dense:
        cut_as_in(state, again, other)
    resumed = pruner_of(again, sgd(again), cap=1, ema=other, state=state)
    assert resumed.done and resumed.cut_epoch == 1
    assert again[0].out_channels == other[0].out_channels == 1
    assert not resumed.epoch_end() and not resumed.observe()
    cut_as_in(state, again, other)  # once more: nothing to do


@pytest.mark.parametrize(
    ("ema", "message"), [("average", "ema: expected"), (nn.Linear(2, 2), "ema: has no parameter or buffer")]
)
def test_an_average_of_something_else_is_refused_at_once(ema, message):
    with pytest.raises(ArgumentError, match=message):
        pruner_of(Net(), ema=ema)


@pytest.mark.parametrize("budget", [Budget(channels=0.5), QUARTER])
def test_importance_is_weighed_against_what_a_neuron_costs(budget):
    """In the unit of the paper, neurons, all cost the same: then the plain ranking decides."""
    model = Net()
    pruner = pruner_of(model, importance="magnitude", budget=budget, floor=0.0)
    pruner.epoch_end()
    graph = trace(model, IMAGES[:2])
    graph.settle()
    scores = early_pruner.filter_norms(graph).double()
    costs = torch.ones_like(scores)
    if budget is QUARTER:
        for group in graph.prunable:
            keep = graph.all_kept()
            keep[group.classes.start] = False
            costs[group.classes] = graph.macs() - graph.macs(keep)
        assert len(costs.unique()) == 2
    keep = graph.select(scores / costs.sqrt(), budget, ranking="global")
    assert pruner.history == [[int(keep[group.classes].sum()) for group in graph.prunable]]
    plain = graph.select(scores, budget, ranking="global")
    assert torch.equal(plain, keep) == (budget is not QUARTER)
