"""Scores against hand computation on coupled weights."""

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import randomise
from torch import nn
from torch.nn import functional as F

from stamp_fast import ArgumentError, Budget, ModelError, importance, trace


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def residual():
    model = randomise(Residual()).double().eval()
    graph = trace(model, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    return model, graph, {g.name: g for g in graph.groups}


def norms(weight, dim: int, p: int):
    other = [d for d in range(weight.dim()) if d != dim]
    return weight.detach().abs().pow(p).sum(other)


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_sums_over_coupled_weights(p):
    model = randomise(Residual()).eval()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    groups = {g.name: g for g in graph.groups}
    scores = importance.magnitude(graph, p=p).double()
    expected = {
        # The residual stream: written by the stem and conv2, read by conv1, project and conv3.
        "stem.0": norms(model.stem[0].weight, 0, p)
        + norms(model.conv2.weight, 0, p)
        + norms(model.conv1.weight, 1, p)
        + norms(model.project.weight, 1, p)
        + norms(model.conv3.weight, 1, p),
        "conv1": norms(model.conv1.weight, 0, p) + norms(model.conv2.weight, 1, p),
        "squeeze": norms(model.squeeze.weight, 0, p) + norms(model.excite.weight, 1, p),
        "project": norms(model.project.weight, 0, p)
        + norms(model.conv3.weight, 0, p)
        + norms(model.squeeze.weight, 1, p)
        + norms(model.excite.weight, 0, p)
        + norms(model.head.weight, 1, p),
    }
    assert set(groups) == set(expected)
    for name, value in expected.items():
        value = value if p == 1 else value.sqrt()
        assert torch.allclose(scores[groups[name].classes], value.double(), rtol=1e-4), name


def test_magnitude_of_a_flattened_map():
    model = randomise(Plain()).eval()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    group = next(g for g in graph.groups if g.name == "conv2")
    columns = norms(model.hidden.weight, 1, 1).view(48, 4).sum(1)
    expected = norms(model.conv2.weight, 0, 1) + columns
    assert torch.allclose(importance.magnitude(graph)[group.classes], expected, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_in_every_dtype(dtype):
    model = randomise(Plain()).eval()
    reference = importance.magnitude(trace(model, torch.randn(2, 1, 8, 8)))
    scores = importance.magnitude(trace(model.to(dtype), torch.randn(2, 1, 8, 8, dtype=dtype)))
    assert scores.dtype == torch.float32
    assert torch.allclose(scores, reference, rtol=1e-2)


def test_magnitude_of_another_norm():
    with pytest.raises(ArgumentError, match="p must be 1 or 2, got 3"):
        importance.magnitude(residual()[1], p=3)


def test_bn_scale_sums_gammas():
    model = randomise(Plain()).eval()
    model.bn1.weight.data[::2] *= -1
    graph = trace(model, torch.randn(2, 1, 8, 8))
    scores = importance.bn_scale(graph)
    groups = {g.name: g for g in graph.groups}
    for name, norm in (("conv1", model.bn1), ("conv2", model.bn2), ("hidden", model.bn3)):
        assert torch.allclose(scores[groups[name].classes], norm.weight.detach().abs()), name


def test_bn_scale_of_a_residual_stream_is_a_sum():
    model = randomise(Residual()).eval()
    graph = trace(model, torch.randn(2, 1, 8, 8))
    graph.protect(["squeeze.bias"])
    group = next(g for g in graph.groups if g.name == "stem.0")
    expected = (model.stem[1].weight.abs() + model.bn2.weight.abs()).detach()
    assert torch.allclose(importance.bn_scale(graph)[group.classes], expected)


def test_bn_scale_without_a_batch_norm_names_the_layer():
    with pytest.raises(ModelError, match=r"bn_scale: .*'squeeze'.*keep=\['squeeze'\]"):
        importance.bn_scale(residual()[1])


def test_random_is_reproducible():
    graph = residual()[1]
    first = importance.random(graph, 3)
    assert first.shape == (graph.num_classes,) and first.unique().numel() > graph.num_classes / 2
    assert torch.equal(first, importance.random(graph, 3))
    assert not torch.equal(first, importance.random(graph, 4))
    rng = torch.get_rng_state()
    assert not torch.equal(importance.random(graph), importance.random(graph))
    assert torch.equal(torch.get_rng_state(), rng)


def data(count: int = 1):
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(16, 1, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(10, (16,), generator=generator),
        )
        for _ in range(count)
    ]


READERS = {
    "stem.0": ["conv1", "project", "conv3"],
    "conv1": ["conv2"],
    "squeeze": ["excite"],
    "project": ["squeeze", "head"],
}


def test_taylor_is_weight_times_gradient_of_all_readers():
    model, graph, groups = residual()
    batches = data(2)
    expected = torch.zeros(graph.num_classes, dtype=torch.float64)
    for batch in batches:
        for parameter in model.parameters():
            parameter.grad = None
        cross_entropy(model, batch).backward()
        for name, readers in READERS.items():
            products = [model.get_submodule(r).weight * model.get_submodule(r).weight.grad for r in readers]
            total = sum(q.sum([d for d in range(q.dim()) if d != 1]) for q in products)
            expected[groups[name].classes] += total.detach().abs() / len(batches)
    for parameter in model.parameters():
        parameter.grad = None
    scores = importance.taylor(graph, batches, cross_entropy)
    assert torch.allclose(scores.double(), expected, rtol=1e-4, atol=1e-7)
    assert (scores > 0).float().mean() > 0.8  # all but those of dead ReLUs
    assert all(p.grad is None for p in model.parameters())


def test_taylor_is_the_slope_of_fading_a_channel_out():
    model, graph, groups = residual()
    batches = data()
    scores = importance.taylor(graph, batches, cross_entropy)
    step = 1e-4
    for name, readers in READERS.items():
        for position in (0, groups[name].num_classes - 1):
            losses = []
            for z in (1 - step, 1 + step):
                originals = {r: model.get_submodule(r).weight.detach().clone() for r in readers}
                # The classes of these groups are in the order of their first emitter.
                with torch.no_grad():
                    for r in readers:
                        model.get_submodule(r).weight[:, position] *= z
                    losses.append(cross_entropy(model, batches[0]).item())
                    for r in readers:
                        model.get_submodule(r).weight.copy_(originals[r])
            slope = abs(losses[1] - losses[0]) / (2 * step)
            assert scores[groups[name].classes][position].item() == pytest.approx(slope, rel=1e-3, abs=1e-7), (
                name,
                position,
            )


def test_taylor_leaves_no_mark():
    model = randomise(Residual()).double().train()
    graph = trace(model, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    model.conv1.weight.grad = torch.ones_like(model.conv1.weight)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    importance.taylor(graph, data(), cross_entropy)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(model.conv1.weight.grad, torch.ones_like(model.conv1.weight))
    assert model.conv2.weight.grad is None and model.training


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "all-frozen"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad], ids=["no_grad", "enable_grad"])
def test_taylor_wants_no_gradients_of_the_caller(context, frozen):
    model, graph, _ = residual()
    expected = importance.taylor(graph, data(), cross_entropy)
    model.requires_grad_(not frozen)
    with context():
        scores = importance.taylor(graph, data(), cross_entropy)
    assert (expected > 0).float().mean() > 0.8
    assert torch.allclose(scores, expected, rtol=1e-5)


def test_taylor_without_a_batch():
    with pytest.raises(ArgumentError, match="at least one batch"):
        importance.taylor(residual()[1], [], cross_entropy)


def test_taylor_scores_channels_that_no_weight_reads():
    """The last convolution's channels are summed up, never multiplied: its own weights stand in."""
    model = randomise(nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), Total())).double()
    graph = trace(model, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    group = next(g for g in graph.groups if g.name == "2")
    scores = importance.taylor(graph, data(), lambda m, b: m(b[0]).square().mean())
    model(data()[0][0]).square().mean().backward()
    weight, bias = model[2].weight, model[2].bias
    expected = ((weight * weight.grad).sum((1, 2, 3)) + bias * bias.grad).abs()
    assert torch.allclose(scores[group.classes].double(), expected.detach(), rtol=1e-4)


class Total(nn.Module):
    def forward(self, x):
        return x.square().sum((1, 2, 3))


def test_nan_scores_are_refused_by_name():
    model, graph, groups = residual()
    scores = importance.magnitude(trace(model.float(), torch.randn(2, 1, 8, 8)))
    scores[groups["squeeze"].classes] = float("nan")
    with pytest.raises(ArgumentError, match="NaN in group 'squeeze'"):
        graph.select(scores, Budget(macs=0.5))


@pytest.mark.parametrize("loss", [None, 0.5, torch.ones(2, requires_grad=True), torch.ones(())], ids=str)
def test_taylor_with_a_loss_that_says_nothing(loss):
    with pytest.raises(ArgumentError, match="taylor: loss_fn must return a scalar tensor"):
        importance.taylor(residual()[1], data(), lambda model, batch: loss)


@pytest.mark.parametrize("seed", [1.5, "1", True])
def test_random_with_no_seed(seed):
    with pytest.raises(ArgumentError, match="random: seed must be a whole number"):
        importance.random(residual()[1], seed)


@pytest.mark.parametrize(
    "score",
    [
        importance.magnitude,
        importance.bn_scale,
        lambda graph: importance.taylor(graph, data(), cross_entropy),
    ],
    ids=["magnitude", "bn_scale", "taylor"],
)
def test_a_graph_of_a_network_that_was_cut_since(score):
    model, graph, _ = residual()
    other = trace(model, torch.randn(2, 1, 8, 8, dtype=torch.float64))
    other.compact(other.select(importance.magnitude(other), Budget(channels=0.5)))
    with pytest.raises(ArgumentError, match="trace it again"):
        score(graph)
