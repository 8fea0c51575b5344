"""Gates against the ancestor's equations, conditioning on the set, and the soft cost."""

import copy

import pytest
import torch
from reference.masked import kept_positions
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise
from torch.nn import functional as F

from stamp_fast import ArgumentError, Budget, importance, trace
from stamp_fast.graph._soft_cost import SoftCost
from stamp_fast.stamp import BetaBernoulliGates, Settings, adapt, expected_gate, kumaraswamy_kl, unconditional
from stamp_fast.stamp.adapt import standardised
from stamp_fast.stamp.statistics import reader_means


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def softplus(value: float) -> float:
    return F.softplus(torch.tensor(value, dtype=torch.float64)).item()


@pytest.mark.parametrize(
    ("a", "b", "mean", "kl"),
    [
        (1.0, 1.0, 0.5, 8.21044),
        (softplus(-1.0), 1.0, 0.23854, 7.0500),
        (softplus(2.0), 1.0, 0.68020, 8.96508),
    ],
)
def test_goldens(a, b, mean, kl):
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    assert expected_gate(a, b).item() == pytest.approx(mean, abs=1e-4)
    assert kumaraswamy_kl(a, b).item() == pytest.approx(kl, abs=1e-4)


def test_mean_and_kl_agree_with_sampling():
    a, b = torch.tensor(1.7, dtype=torch.float64), torch.tensor(2.3, dtype=torch.float64)
    u = torch.rand(2_000_000, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
    pi = (1 - u ** (1 / b)) ** (1 / a)
    assert expected_gate(a, b).item() == pytest.approx(pi.mean().item(), abs=2e-3)
    alpha = 1e-4
    log_q = (a * b).log() + (a - 1) * pi.log() + (b - 1) * torch.log1p(-(pi**a))
    log_p = torch.tensor(alpha).log() + (alpha - 1) * pi.log()
    assert kumaraswamy_kl(a, b).item() == pytest.approx((log_q - log_p).mean().item(), rel=2e-3)


@pytest.mark.parametrize("scale", [0.1, 1.0, 50.0])
def test_probabilities_and_samples_lie_between_zero_and_one(scale):
    gates = BetaBernoulliGates(scale * torch.randn(200))
    with torch.no_grad():
        for parameter in gates.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    p = gates.probability()
    assert (p > 0).all() and (p < 1).all()
    for _ in range(20):
        # At a temperature of 0.1 a sample may round to 0 or 1.
        z = gates.sample()
        assert (z >= 0).all() and (z <= 1).all()
    assert torch.isfinite(gates.kl())


def test_initial_means_are_those_of_the_ancestor():
    gates = BetaBernoulliGates(torch.zeros(3), a=torch.full((3,), 2.0))
    a, b = gates.a_b()
    assert torch.allclose(b, torch.ones(3), atol=1e-4)
    assert torch.allclose(a, torch.full((3,), 2.12693), atol=1e-4)


def test_gradients_reach_every_gate_parameter():
    gates = BetaBernoulliGates(torch.randn(50))
    target = torch.rand(50)
    (gates.sample(torch.Generator().manual_seed(0)) - target).square().sum().backward()
    names = [name for name, _ in gates.named_parameters()]
    assert len(names) >= 6
    for name, parameter in gates.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any(), name
    gates.zero_grad()
    gates.probability().square().sum().backward()
    for name, parameter in gates.named_parameters():
        assert (parameter.grad != 0).any(), name


def test_samples_are_reproducible_by_their_generator():
    gates = BetaBernoulliGates(torch.randn(50))
    rng = torch.get_rng_state()
    first = gates.sample(torch.Generator().manual_seed(4))
    assert torch.equal(first, gates.sample(torch.Generator().manual_seed(4)))
    assert not torch.equal(first, gates.sample(torch.Generator().manual_seed(5)))
    assert torch.equal(torch.get_rng_state(), rng)


def test_other_sets_other_probabilities():
    model = randomise(Residual())
    graph = trace(model, torch.randn(2, 1, 8, 8))
    sets = torch.rand(16, 1, 8, 8), -torch.rand(16, 1, 8, 8)
    gates = [BetaBernoulliGates(standardised(graph, reader_means(graph, x))) for x in sets]
    first, second = (g.probability() for g in gates)
    assert (first - second).abs().max() > 1e-2
    # The order of the examples does not matter.
    again = BetaBernoulliGates(standardised(graph, reader_means(graph, sets[0].flip(0)))).probability()
    assert torch.allclose(first, again, atol=1e-5)


def test_statistics_are_the_means_that_readers_see():
    model = randomise(Plain()).eval()
    x = torch.randn(6, 1, 8, 8)
    graph = trace(model, x)
    means = reader_means(graph, x)
    with torch.no_grad():
        first = torch.max_pool2d(torch.relu(model.bn1(model.conv1(x))), 2)
        second = torch.max_pool2d(torch.relu(model.bn2(model.conv2(first))), 2)
        third = torch.relu(model.bn3(model.hidden(second.flatten(1))))
    groups = {g.name: g for g in graph.groups}
    for name, activation in (("conv1", first), ("conv2", second), ("hidden", third)):
        expected = activation.transpose(0, 1).flatten(1).mean(1)
        assert torch.allclose(means[groups[name].classes], expected, atol=1e-5), name
        scaled = standardised(graph, means)[groups[name].classes]
        assert scaled.mean().abs() < 1e-5 and scaled.std() == pytest.approx(1, abs=1e-4)


def test_statistics_leave_no_mark():
    model = randomise(Residual()).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    reader_means(trace(model, torch.randn(2, 1, 8, 8)), torch.randn(4, 1, 8, 8))
    assert all(module.training for module in model.modules())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_virtual_compaction_trains_the_live_slices_only():
    model = randomise(Residual()).double().train()
    x, y = torch.randn(16, 1, 8, 8, dtype=torch.float64), torch.randint(10, (16,))
    graph = trace(model, x)
    keep = random_keep(graph)
    positions = kept_positions(graph, keep)
    gates = BetaBernoulliGates(torch.randn(graph.num_classes)).double()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    with graph.masked(graph.plan(keep), gates.sample(torch.Generator().manual_seed(0))):
        F.cross_entropy(model(x), y).backward()
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        live = torch.ones_like(grad, dtype=torch.bool)
        for dim, stays in enumerate(positions[name]):
            live &= stays.view([-1 if d == dim else 1 for d in range(grad.dim())])
        assert not grad[~live].any(), f"{name}: a dead position was trained"
        assert grad[live].any(), f"{name}: nothing was trained"
    dead = ~keep
    for name, parameter in gates.named_parameters():
        if parameter.numel() == graph.num_classes:
            assert not parameter.grad[dead].any(), name
            assert (parameter.grad[keep] != 0).float().mean() > 0.9, name
    assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())


@pytest.mark.parametrize("network", [Plain, Residual])
@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_soft_cost_at_hard_masks(network, kind):
    graph = trace(network(), torch.randn(2, 1, 8, 8))
    cost = SoftCost(graph, kind)
    count = getattr(graph, kind)
    assert cost(torch.ones(graph.num_classes)).item() == pytest.approx(1, abs=1e-6)
    for seed in range(5):
        keep = random_keep(graph, seed)
        assert cost(keep.float()).item() == pytest.approx(count(keep) / count(), rel=1e-4)
        assert count(keep) < count()


@pytest.mark.parametrize("kind", ["macs", "params", "channels"])
def test_soft_cost_gradient(kind):
    graph = trace(Residual(), torch.randn(2, 1, 8, 8))
    cost = SoftCost(graph, kind)
    p = (0.2 + 0.6 * torch.rand(graph.num_classes)).requires_grad_()
    cost(p).backward()
    step = 0.1  # multilinear: central differences are exact but for rounding
    for c in torch.randperm(graph.num_classes)[:12]:
        shift = torch.zeros(graph.num_classes)
        shift[c] = step
        with torch.no_grad():
            difference = (cost(p + shift) - cost(p - shift)) / (2 * step)
        assert p.grad[c].item() == pytest.approx(difference.item(), rel=2e-2, abs=1e-5)
        assert p.grad[c] > 0


def adapted(model, x, y, budget=Budget(macs=0.5), seed=0, steps=6, **options):  # noqa: B008  (frozen)
    """The graph, the probabilities and what is kept by them."""
    graph = trace(model, x)
    probability = adapt(
        graph,
        unconditional(graph, x),
        lambda count: [(x, y)] * count,
        lambda m, b: F.cross_entropy(m(b[0]), b[1]),
        budget,
        lambda scores: chosen(graph, scores, budget),
        steps=steps,
        set_size=64,
        generator=torch.Generator().manual_seed(seed),
        **options,
    )
    return graph, probability, chosen(graph, probability, budget)


def chosen(graph, scores, budget):
    return budget.select(graph, scores, ranking="global", floor=0.1, exact=False)


@pytest.mark.parametrize("folds", [False, True])
def test_adaptation_trains_the_weights_that_stay_and_leaves_buffers(folds):
    model = randomise(Residual()).train()
    old = copy.deepcopy(model)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    graph, probability, keep = adapted(model, x, y, folds=[x] if folds else None)
    positions = kept_positions(graph, keep)
    assert probability.shape == (graph.num_classes,)
    assert ((probability > 0) & (probability < 1)).all()
    assert probability.unique().numel() > graph.num_classes / 2
    for (name, new), before in zip(model.named_parameters(), old.parameters(), strict=True):
        assert not torch.equal(new, before), f"{name} was not trained"
        assert new.grad is None
        live = torch.ones_like(new, dtype=torch.bool)
        for dim, stays in enumerate(positions[name]):
            live &= stays.view([-1 if d == dim else 1 for d in range(new.dim())])
        # The head was fitted while it still read all channels.
        unchanged = torch.equal(new[~live], before[~live])
        assert folds or unchanged or name.startswith("head"), f"{name}: what goes was trained"
    for (name, new), before in zip(model.named_buffers(), old.buffers(), strict=True):
        assert torch.equal(new, before), name


def test_adaptation_is_reproducible_and_conditioned_on_the_set():
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    runs = []
    for inputs, seed in ((x, 0), (x, 0), (x, 1), (x.abs() * 3, 0)):
        model = randomise(Residual()).train()
        runs.append(adapted(model, inputs, y, seed=seed)[1])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert (runs[0] - runs[3]).abs().max() > 1e-2


def test_a_tighter_budget_lowers_the_probabilities():
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    options = {"steps": 20, "settings": Settings(mode="structure")}  # all steps are for the gates
    asks = (1.0, 0.2)
    means = [adapted(randomise(Residual()).train(), x, y, Budget(macs=ask), **options)[1].mean() for ask in asks]
    assert means[1] < means[0]


def test_structure_mode_leaves_the_weights():
    model = randomise(Residual()).train()
    old = copy.deepcopy(model)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    before = unconditional(trace(model, x), x).probability().detach()
    _, after, _ = adapted(model, x, y, steps=4, settings=Settings(mode="structure"))
    assert not torch.equal(before, after)
    for (name, new), was in zip(model.named_parameters(), old.parameters(), strict=True):
        assert torch.equal(new, was) != name.startswith("head"), name
        assert new.requires_grad, name


def test_unconditional_gates_rank_as_the_norm_does_with_equal_shares():
    graph = trace(randomise(Residual()), torch.randn(2, 1, 8, 8))
    gates = unconditional(graph, torch.randn(4, 1, 8, 8))
    torch.nn.init.zeros_(gates.gamma)  # without what the set has to say
    probability = gates.probability().detach()
    scores = importance.magnitude(graph)
    for group in graph.groups:
        assert torch.equal(probability[group.classes].argsort(), scores[group.classes].argsort())
    keep = chosen(graph, probability, Budget(macs=0.4))
    shares = [keep[g.classes].float().mean().item() for g in graph.groups if g.reason is None]
    assert max(shares) - min(shares) < 0.26  # one of the 8 channels of the narrowest group, both ways


@pytest.mark.parametrize("rest", [torch.nn.Parameter, None])
def test_joint_mode_without_weights_to_train(rest):
    model = randomise(Residual()).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if rest is not None:
        model.head.bias.requires_grad_(True)
    x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
    _, probability, _ = adapted(model, x, y, steps=2)
    assert bool(probability.isfinite().all())


def test_modes():
    with pytest.raises(ArgumentError, match="mode: must be one of joint, structure, got 'both'"):
        Settings(mode="both")
