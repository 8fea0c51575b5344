"""The scores against the formulas written out by hand, for networks small enough for that."""

import pytest
import torch
from torch import nn

from stamp_fast import ArgumentError, trace
from stamp_fast.early.scores import GradientScores, filter_norms

IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Coupled(nn.Module):
    """A residual sum of two convolutions with batch norm, a plain convolution, a depthwise one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn_a = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.b, self.bn_b = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.plain = nn.Conv2d(6, 5, 1)
        self.depthwise = nn.Conv2d(5, 5, 3, groups=5)
        self.head = nn.Linear(5, 4)

    def forward(self, x):
        x = self.bn_a(self.a(x)).relu()
        x = (x + self.bn_b(self.b(x))).relu()
        return self.head(self.depthwise(self.plain(x).relu()).mean((2, 3)))


@pytest.fixture
def model():
    model = Coupled()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def group_with(graph, layer):
    return next(g.classes for g, names in zip(graph.groups, graph.layers(), strict=True) if layer in names)


def test_filter_norms(model):
    graph = trace(model, IMAGES[:2])
    scores = filter_norms(graph)
    filters = torch.cat([model.a.weight.flatten(1), model.b.weight.flatten(1)], 1)  # coupled: one neuron
    torch.testing.assert_close(scores[group_with(graph, "a")], filters.norm(dim=1) / filters.shape[1] ** 0.5)
    follows = model.plain.weight.flatten(1)  # and the depthwise filter follows it
    torch.testing.assert_close(scores[group_with(graph, "plain")], follows.norm(dim=1) / 6**0.5)


def test_gradient_scores(model):
    graph = trace(model, IMAGES[:2])
    scores = GradientScores(graph)
    expected = {"a": torch.zeros(6), "plain": torch.zeros(5)}
    for batch in IMAGES.split(2):
        model.zero_grad()
        model(batch).square().sum().backward()
        scores.add()
        with torch.no_grad():
            norms = (model.bn_a, model.bn_b)
            expected["a"] += sum(n.weight * n.weight.grad + n.bias * n.bias.grad for n in norms).abs() / 3
            # No batch norm: every parameter that makes the channel, depthwise filter and biases among them.
            made = sum((p * p.grad).flatten(1).sum(1) for p in (model.plain.weight, model.depthwise.weight))
            made += sum(p * p.grad for p in (model.plain.bias, model.depthwise.bias))
            expected["plain"] += made.abs() / 3
    for layer, values in expected.items():
        torch.testing.assert_close(scores.mean()[group_with(graph, layer)], values)


def test_a_loss_that_was_scaled_up(model):
    graph = trace(model, IMAGES[:2])
    plain, scaled = GradientScores(graph), GradientScores(graph)
    model(IMAGES).square().mean().backward()
    plain.add()
    for parameter in model.parameters():
        parameter.grad *= 1024
    scaled.add(scale=1024.0)
    torch.testing.assert_close(scaled.mean(), plain.mean())


def test_an_overflow_is_left_out(model):
    graph = trace(model, IMAGES[:2])
    scores = GradientScores(graph)
    model(IMAGES).square().mean().backward()
    scores.add()
    before = scores.mean()
    model.bn_b.weight.grad[0] = float("inf")
    scores.add()
    assert torch.equal(scores.mean(), before)


def test_a_layer_that_is_not_trained_is_named(model):
    for module in (model.a, model.bn_a, model.b, model.bn_b):
        module.requires_grad_(False)
    with pytest.raises(ArgumentError, match=r"keep=\['a'\]"):
        GradientScores(trace(model, IMAGES[:2]))


def test_without_gradients(model):
    scores = GradientScores(trace(model, IMAGES[:2]))
    with pytest.raises(ArgumentError, match="before zero_grad"):
        scores.add()
    with pytest.raises(ArgumentError, match="call observe"):
        scores.mean()


def test_a_filter_that_reads_one_channel_is_no_depthwise_one():
    class Gray(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1), nn.Linear(6, 4)

        def forward(self, x):
            x = self.a(x).relu()
            return self.head((x + self.b(x)).mean((2, 3)))

    model = Gray()
    graph = trace(model, IMAGES[:2, :1])
    filters = torch.cat([model.a.weight.flatten(1), model.b.weight.flatten(1)], 1)
    expected = filters.norm(dim=1) / filters.shape[1] ** 0.5
    torch.testing.assert_close(filter_norms(graph)[group_with(graph, "a")], expected)
