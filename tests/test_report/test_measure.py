"""That measurements measure, and leave no mark; on a clock that ticks with the operators, where times matter."""

import copy
from types import SimpleNamespace

import pytest
import torch
from reference.clock import Ticking
from reference.state import Frozen
from torch import Tensor, nn
from torch.nn import functional as F

from stamp_fast import ArgumentError, LoaderError, ModelError
from stamp_fast.data import cross_entropy
from stamp_fast.report import StepCost, compare_forwards, compare_steps, layer_times, measure


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def test_steps_are_measured_in_turns():
    torch.set_num_threads(1)
    small, large = nn.Linear(256, 256), nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)])
    batch = torch.randn(256, 256), torch.randn(256, 256)
    costs = compare_steps([large, small], batch, loss)
    assert [type(c) for c in costs] == [StepCost, StepCost]
    assert costs[0].milliseconds > 2 * costs[1].milliseconds > 0
    assert costs[0].peak_bytes > 4 * costs[1].peak_bytes


def test_peak_memory_of_a_known_step():
    """Gradient and momentum, and little else; nothing that was there before."""
    torch.set_num_threads(1)
    model = nn.Linear(1000, 1000, bias=False)
    batch = torch.randn(1, 1000), torch.randn(1, 1000)
    peak = compare_steps([model], batch, loss)[0].peak_bytes
    weight = 4 * 1000 * 1000
    assert 2 * weight <= peak <= 3.1 * weight, "a gradient and a momentum buffer at least"


def test_peak_memory_is_that_of_every_step_but_the_first():
    """Held to all that is alive from before the model is made to the end of the second step."""
    with (tracker := measure.LiveBytes([])):
        model = nn.Sequential(nn.Linear(500, 500), nn.ReLU(), nn.Linear(500, 500))
        batch = torch.randn(2000, 500), torch.randn(2000, 500)
        optimizer = torch.optim.SGD(model.parameters(), 0.0, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
    del optimizer
    model.zero_grad()
    assert compare_steps([model], batch, loss)[0].peak_bytes == pytest.approx(tracker.peak, rel=0.01)


def test_a_short_time_still_gives_a_measurement():
    cost = compare_steps([nn.Linear(4, 4)], (torch.randn(2, 4), torch.randn(2, 4)), loss, seconds=0.0)[0]
    assert cost.milliseconds > 0


def test_frozen_models_are_measured():
    model = nn.Linear(4, 4).requires_grad_(False)
    cost = compare_steps([model], (torch.randn(2, 4), torch.randn(2, 4)), loss)[0]
    assert cost.milliseconds > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_steps_train_whatever_the_context(context):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with context():
        compare_steps([model], (torch.randn(2, 4), torch.randn(2, 4)), loss)
    assert bool(model.weight.grad.any())
    assert torch.equal(model.weight, before), "a loss of any scale has to stay finite"


@pytest.fixture
def ticking(monkeypatch):
    """`ticking(slowness)` is a context in which measurements are of operators, not of time."""

    def start(slowness: float = 1.0) -> Ticking:
        clock = Ticking(slowness)
        monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=clock.perf_counter))
        return clock

    return start


class Block(nn.Module):
    """Activations in place, a layer that runs twice, a functional call, a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool, self.head = nn.Flatten(), nn.Linear(8 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.act(self.first(x))
        h = h + self.act(self.second(h))
        h = h + F.relu(self.second(h), inplace=True)
        return self.head(self.pool(h))


def batch_of(count: int = 2) -> tuple[Tensor, Tensor]:
    return torch.randn(count, 3, 4, 4), torch.randint(5, (count,))


def test_layers_get_what_their_operators_take(ticking):
    with ticking():
        times = layer_times(Block(), batch_of())
    assert times == pytest.approx(
        {
            "first": 30,
            "act": 2 * (1 + 2),
            "second": 2 * 30,
            "pool": 0,
            "head": 3 + 2 * 3,
            "(optimizer)": 6,
            "(other)": 1 + 2,
        }
    )
    assert list(times)[:5] == ["first", "act", "second", "pool", "head"]


@pytest.mark.parametrize("slowness, timed, runs", [(0.01, 9, 14), (1.0, 6, 11), (3.0, 2, 5), (1000.0, 1, 4)])
def test_layers_add_up_to_the_step_however_slow_it_is(ticking, slowness, timed, runs):
    """A step takes 0.114 s here. Two warm up, one to three are by layer; slow ones are not repeated."""
    calls = 0

    def counted(model, batch):
        nonlocal calls
        calls += 1
        return F.cross_entropy(model(batch[0]), batch[1])

    model = Block()
    with ticking(slowness):
        cost = compare_steps([model], batch_of(), counted)[0]
    assert cost.milliseconds == pytest.approx(114 * slowness)
    assert sum(cost.layers.values()) == pytest.approx(cost.milliseconds)
    assert (cost.steps, calls) == (timed, runs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_forwards_are_in_eval_mode_without_gradients(ticking):
    seen = []

    class Looking(Block):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return super().forward(x)

    with ticking():
        assert compare_forwards([Looking(), Looking()], batch_of()[0]) == pytest.approx([36, 36])
    assert set(seen) == {(False, False)} and len(seen) > 2
    seen.clear()
    with ticking(1000.0):
        compare_forwards([Looking(), Looking()], batch_of()[0])
    assert len(seen) == 2, "slow ones are not repeated"


def test_inputs_that_a_forward_changes_are_copied():
    class InPlace(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.add_(1.0)

    x = torch.zeros(3)
    compare_forwards([InPlace()], x)
    assert bool((x == 0).all())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = x.flatten(2).mT.repeat(1, 1, 3)[..., :8]
        return self.head(self.attn(h, h, h, need_weights=True)[0].mean(1))


def test_weights_used_without_their_module_belong_to_the_layer_around(ticking):
    """Attention calls no module for its projections."""
    with ticking():
        times = layer_times(Attention(), batch_of())
    assert "attn.out_proj" not in times and times["attn"] > 20 and times["(other)"] == 0


def test_what_computes_a_weight_belongs_to_the_layer(ticking):
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return torch.relu(weight)

    model = Block()
    nn.utils.parametrize.register_parametrization(model.first, "weight", Doubled())
    with ticking():
        times = layer_times(model, batch_of())
    assert times["first"] == pytest.approx(30 + 1 + 2)
    assert not any("parametrizations" in name for name in times)


def test_checkpointed_layers_run_their_forward_twice(ticking):
    class Checkpointed(Block):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.utils.checkpoint.checkpoint(lambda v: self.act(self.first(v)), x, use_reentrant=False)
            return self.head(self.pool(self.second(h)))

    with ticking():
        times = layer_times(Checkpointed(), batch_of())
    # In place, the activation needs no more of the forward than its own result, so that it runs again as well.
    assert times == pytest.approx(
        {"first": 40, "act": 4, "second": 30, "pool": 0, "head": 9, "(optimizer)": 6, "(other)": 0}
    )


def test_custom_functions_belong_to_their_layer(ticking):
    class Relu(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return torch.relu(x)

        @staticmethod
        def backward(ctx, grad):
            return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0)

    class Custom(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Relu.apply(x)

    model = Block()
    model.act = Custom()
    with ticking():
        assert layer_times(model, batch_of())["act"] == pytest.approx(6)


def test_what_is_done_with_a_gradient_belongs_to_its_layer(ticking):
    """As where the optimizer steps amid the backward."""

    def rectify(weight: Tensor) -> None:
        weight.grad.relu_()

    model = Block()
    model.first.weight.register_post_accumulate_grad_hook(rectify)
    with ticking():
        layers = compare_steps([model], batch_of(), cross_entropy)[0].layers
    assert layers["first"] == pytest.approx(31) and layers["(other)"] == pytest.approx(3)


def test_a_layer_that_raises_is_left_behind(ticking):
    class Refusing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise NotImplementedError

    class Trying(Block):
        def __init__(self) -> None:
            super().__init__()
            self.refusing = Refusing()

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.refusing(x)
            except NotImplementedError:
                return super().forward(torch.relu(x))

    with ticking():
        times = layer_times(Trying(), batch_of())
    assert times["refusing"] == 0 and times["(other)"] == pytest.approx(1 + 3) and times["first"] == pytest.approx(30)


def test_a_model_that_is_one_layer(ticking):
    with ticking():
        times = layer_times(nn.Linear(4, 5), (torch.randn(2, 4), torch.randint(5, (2,))))
    assert times[""] == pytest.approx(6), "no gradient of the input"


def test_layer_times_leave_no_mark():
    model = nn.Sequential(Block(), nn.BatchNorm1d(5), nn.Dropout())
    F.cross_entropy(model(batch_of()[0]), batch_of()[1]).backward()
    model.eval()
    seen = []
    model[0].first.register_forward_hook(lambda *_: seen.append(1))
    batch = batch_of()
    hooks = [copy.copy(m._forward_hooks) for m in model.modules()]
    before = Frozen(model)
    layer_times(model, batch)
    before.assert_same()
    assert hooks == [m._forward_hooks for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_layer_times_name_what_is_wrong():
    class Holding(Block):
        def __init__(self) -> None:
            super().__init__()
            self.stream = (i for i in range(3))

    with pytest.raises(ModelError, match="layer_times: the model cannot be copied.*generators"):
        layer_times(Holding(), batch_of())
    with pytest.raises(LoaderError, match="targets"):
        layer_times(Block(), (torch.randn(2, 3, 4, 4), torch.randn(3)))
    with pytest.raises(ArgumentError, match="does not depend on the model's parameters"):
        layer_times(Block(), batch_of(), lambda m, b: m(b[0]).detach().sum())
