"""The set encoder: a function of sets, whatever their order, their size or their classes."""

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import randomise
from torch.nn import functional as F

from stamp_fast import ArgumentError, trace
from stamp_fast.stamp import SetEncoder
from stamp_fast.stamp.set_encoder import KINDS, MAB
from stamp_fast.stamp.statistics import image_means, reader_means

SHAPE = (1, 8, 8)


def encoder_of(graph, kind: str = "activation") -> SetEncoder:
    """One whose every parameter counts."""
    encoder = SetEncoder([g.num_classes for g in graph.groups], kind, image_shape=SHAPE)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.eval()


@pytest.fixture
def graph():
    return trace(randomise(Residual()).eval(), torch.randn(2, *SHAPE))


@pytest.mark.parametrize("kind", KINDS)
def test_order_does_not_matter(kind, graph):
    encoder = encoder_of(graph, kind)
    images, labels = torch.randn(24, *SHAPE), torch.randint(5, (24,))
    order = torch.randperm(24)
    names = torch.randperm(5)  # nor do the numbers that classes go by
    o, codes = encoder(graph, images, labels)
    again, same_codes = encoder(graph, images[order], names[labels[order]])
    assert torch.allclose(o, again, atol=1e-6, equal_nan=True)
    assert torch.allclose(codes, same_codes, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_other_sets_other_statistics(kind, graph):
    encoder = encoder_of(graph, kind)
    first, _ = encoder(graph, torch.rand(8, *SHAPE), torch.arange(8) % 2)
    second, _ = encoder(graph, -torch.rand(8, *SHAPE), torch.arange(8) % 2)
    assert (first - second).abs().nan_to_num().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("images", [1, 2, 7, 50])
def test_any_size(kind, images, graph):
    o, codes = encoder_of(graph, kind)(graph, torch.randn(images, *SHAPE), None)
    assert o.shape == (graph.num_classes,) and o.nan_to_num().isfinite().all()
    assert codes.shape == (len(graph.groups), 64)


def test_classes_of_unequal_size_are_padded_without_a_trace(graph):
    """The prototype of a class is that of the class alone."""
    encoder = encoder_of(graph)
    images = torch.randn(9, *SHAPE)
    labels = torch.tensor([0] * 7 + [1] * 2)
    seen = []
    hook = encoder.across.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    encoder(graph, images, labels)
    encoder(graph, images[:7], labels[:7])
    encoder(graph, images[7:], labels[7:])
    hook.remove()
    both, first, second = seen  # [groups, classes, width]
    assert torch.allclose(both[:, :1], first, atol=1e-5) and torch.allclose(both[:, 1:], second, atol=1e-5)


def test_classes_matter(graph):
    encoder = encoder_of(graph)
    images = torch.randn(8, *SHAPE)
    _, one = encoder(graph, images, torch.zeros(8, dtype=torch.long))
    _, two = encoder(graph, images, torch.arange(8) % 2)
    assert (one - two).abs().max() > 1e-4


def test_starts_as_the_plain_mean(graph):
    encoder = SetEncoder([g.num_classes for g in graph.groups])
    images = torch.randn(6, *SHAPE)
    o, _ = encoder(graph, images, None)
    assert torch.allclose(o, reader_means(graph, images), equal_nan=True)


@pytest.mark.parametrize("kind", ["activation", "input"])
def test_gradients_reach_every_parameter(kind, graph):
    encoder = encoder_of(graph, kind)
    o, codes = encoder(graph, torch.randn(6, *SHAPE), torch.arange(6) % 3)
    (o.nan_to_num().square().sum() + codes.square().sum()).backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_the_network_is_left_as_it_was(graph):
    before = {name: t.clone() for name, t in graph.model.state_dict().items()}
    o, _ = encoder_of(graph, "input")(graph, torch.randn(6, *SHAPE), None)
    o.nan_to_num().sum().backward()
    assert all(parameter.grad is None for parameter in graph.model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in graph.model.state_dict().items())


def test_means_of_every_image():
    model = randomise(Plain()).eval()
    images = torch.randn(5, *SHAPE)
    graph = trace(model, images)
    means = image_means(graph, images)
    with torch.no_grad():
        first = torch.max_pool2d(torch.relu(model.bn1(model.conv1(images))), 2)
    classes = next(g for g in graph.groups if g.name == "conv1").classes
    assert torch.allclose(means[:, classes], first.mean((2, 3)), atol=1e-5)


def test_attention_block_against_its_definition():
    block = MAB(8).double()
    x, y = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(2, 5, 8, dtype=torch.float64)
    attention, heads = block.attention, 4
    q, k, v = (
        F.linear(t, w, b).unflatten(-1, (heads, 2)).transpose(1, 2)
        for t, w, b in zip((x, y, y), attention.in_proj_weight.chunk(3), attention.in_proj_bias.chunk(3), strict=True)
    )
    mixed = ((q @ k.mT / 2**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    h = block.after_attention(x + attention.out_proj(mixed))
    assert torch.allclose(block(x, y), block.after_feed_forward(h + block.feed_forward(h)))


def test_bad_arguments(graph):
    with pytest.raises(ArgumentError, match="encoder: must be one of activation, mean, input"):
        SetEncoder([4], "activations")
    with pytest.raises(ArgumentError, match="needs the shape of an image"):
        SetEncoder([4], "input")
    with pytest.raises(ArgumentError, match=r"labels: expected one for each of the 4 images, got \(3,\)"):
        encoder_of(graph)(graph, torch.randn(4, *SHAPE), torch.arange(3))
    with pytest.raises(ArgumentError, match=r"takes one tensor of images of shape \(1, 8, 8\)"):
        encoder_of(graph, "input")(graph, torch.randn(2, 1, 9, 9), None)
