"""Generators: what they start as, what they are conditioned on, and their files."""

import dataclasses

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import randomise
from torch import nn

import stamp_fast
from stamp_fast import ArgumentError, Budget, CheckpointError, importance, trace
from stamp_fast.stamp import MaskGenerator
from stamp_fast.stamp.set_encoder import KINDS

SHAPE = (1, 8, 8)
HALF = Budget(macs=0.5)


def traced(classes: int = 10, width: int = 8):
    return trace(randomise(Residual(classes, width)).eval(), torch.randn(2, *SHAPE))


def learned(graph, kind: str = "activation") -> MaskGenerator:
    """As if it had been trained: no parameter at its start."""
    generator = MaskGenerator.untrained(graph, kind, SHAPE, "structure")
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        for _ in range(3):
            generator.follow(generator(graph, torch.randn(12, *SHAPE), None, HALF)[1])
    return generator.eval()


def test_untrained_ranks_as_l1_with_equal_shares():
    graph = traced()
    gates = MaskGenerator.untrained(graph, "mean").gates(graph, torch.zeros(4, *SHAPE), None, HALF)
    gates.statistic.data.zero_()
    p, norms = gates.probability(), importance.magnitude(graph)
    for group in graph.groups:
        assert torch.equal(p[group.classes].argsort(), norms[group.classes].argsort()), group.name
    keep = graph.select(p.detach(), Budget(channels=0.5), ranking="global", exact=False)
    for group in graph.prunable:
        share = keep[group.classes].float().mean().item()
        assert share == pytest.approx(0.5, abs=1 / group.num_classes), group.name


@pytest.mark.parametrize("kind", KINDS)
def test_gates_depend_on_the_set_and_not_on_its_order(kind):
    graph = traced()
    generator = learned(graph, kind)
    images, labels = torch.rand(16, *SHAPE), torch.arange(16) % 4
    p = generator.gates(graph, images, labels, HALF).probability()
    order = torch.randperm(16)
    assert torch.allclose(p, generator.gates(graph, images[order], labels[order], HALF).probability(), atol=1e-6)
    assert (p - generator.gates(graph, -images, labels, HALF).probability()).abs().max() > 1e-3


def test_one_generator_serves_many_budgets():
    graph = traced()
    generator = learned(graph)
    images = torch.rand(16, *SHAPE)
    half, eighth = (generator.gates(graph, images, None, Budget(macs=b)).shift for b in (0.5, 0.125))
    assert (half - eighth).abs().max() > 1e-3
    for group in graph.groups:
        assert half[group.classes].unique().numel() == 1
    assert half.abs().max() <= 1.5


def test_gradients_reach_every_parameter():
    graph = traced()
    generator = learned(graph)
    start, _ = generator(graph, torch.rand(16, *SHAPE), torch.arange(16) % 4, HALF)
    sum(value.square().sum() for value in start.values()).backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, name


def test_running_statistics_follow_the_tasks():
    graph = traced()
    generator = MaskGenerator.untrained(graph)
    for _ in range(400):
        generator.follow(torch.randn(graph.num_classes) * 3 + 5)
    assert generator.mu.mean().item() == pytest.approx(5, abs=0.5)
    assert generator.sigma.mean().item() == pytest.approx(3, abs=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_file_gives_back_the_same_generator(kind, tmp_path):
    graph = traced()
    generator = learned(graph, kind)
    generator.save(tmp_path / "g.safetensors")
    again = MaskGenerator.load(tmp_path / "g.safetensors")
    images = torch.rand(8, *SHAPE)
    assert torch.equal(
        generator.gates(graph, images, None, HALF).probability(), again.gates(graph, images, None, HALF).probability()
    )
    assert (again.architecture, again.mode) == (generator.architecture, generator.mode)


@pytest.mark.parametrize("kind", KINDS)
def test_other_default_dtypes(kind, tmp_path):
    """Generators are of float32, whatever the network, the process or the user has made of it."""
    graph = traced()
    generator = learned(graph, kind)
    generator.save(tmp_path / "g")
    batches = [(torch.rand(16, *SHAPE, dtype=torch.float64), torch.arange(16) % 10)]
    torch.set_default_dtype(torch.float64)
    try:
        for given in (tmp_path / "g", generator.double()):
            model = randomise(Residual()).double()
            stamp_fast.prune(model, batches, generator=given, steps=1, progress=False)
        assert MaskGenerator.load(tmp_path / "g").beta.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_files_that_hold_nan_are_refused(tmp_path):
    generator = learned(traced())
    with torch.no_grad():
        generator.beta[3] = float("nan")
    generator.save(tmp_path / "g")
    with pytest.raises(CheckpointError, match="it holds NaN or inf"):
        MaskGenerator.load(tmp_path / "g")


def test_other_heads_and_other_weights_fit():
    generator = learned(traced())
    generator.check_fits(traced(classes=3))
    other = trace(randomise(Residual(10, 8), seed=5), torch.randn(2, 1, 16, 16))
    generator.check_fits(other)


class Other(Residual):
    def forward(self, x):
        return super().forward(torch.tanh(x))


@pytest.mark.parametrize(
    ("network", "match"),
    [
        (lambda: Residual(width=12), r"is for Residual, not for this Residual: it has 'stem\.0' with 8 channel"),
        (Plain, "is for Residual, not for this Plain: it has 'stem"),
        (Other, "not for this Other: it has other operators in its forward"),
    ],
    ids=["width", "network", "forward"],
)
def test_another_architecture_is_refused_by_name(network, match, tmp_path):
    learned(traced()).save(tmp_path / "g")
    model = network()
    loader = [(torch.randn(8, *SHAPE), torch.randint(10, (8,)))] * 2
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=match):
        stamp_fast.prune(model, loader, generator=tmp_path / "g", progress=False)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("steps", [0, 2])
def test_prune_with_a_generator(steps, tmp_path):
    graph = traced()
    generator = learned(graph)
    model = randomise(Residual())
    loader = [(torch.randn(16, *SHAPE), torch.randint(10, (16,))) for _ in range(3)]
    stamp_fast.prune(model, loader, generator=generator, steps=steps, seed=0, progress=False)
    report = stamp_fast.report(model)
    assert report.macs_after / report.macs_before == pytest.approx(0.5, rel=0.02)
    assert model(torch.randn(2, *SHAPE)).shape == (2, 10)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"generator": 3}, ArgumentError, "expected a MaskGenerator or the file of one, got int"),
        ({"generator": "nowhere.safetensors"}, CheckpointError, "no such file"),
        ({"steps": 0}, ArgumentError, "steps: must be at least 1 where no generator"),
        ({"method": "taylor"}, ArgumentError, "is for method 'stamp', not for 'taylor'"),
    ],
)
def test_bad_arguments(arguments, error, match):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3))
    loader = [(torch.randn(8, *SHAPE), torch.randint(3, (8,)))]
    if arguments.get("method"):
        arguments["generator"] = MaskGenerator.untrained(trace(model, torch.randn(2, *SHAPE)))
    with pytest.raises(error, match=match):
        stamp_fast.prune(model, loader, progress=False, **arguments)


def test_files_of_other_kinds(tmp_path):
    stamp_fast.save(Residual(), tmp_path / "network")
    with pytest.raises(CheckpointError, match="was not written by MaskGenerator.save"):
        MaskGenerator.load(tmp_path / "network")
    generator = learned(traced())
    generator.save(tmp_path / "g")
    content = bytearray((tmp_path / "g").read_bytes())
    content[-9] ^= 1
    (tmp_path / "flipped").write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        MaskGenerator.load(tmp_path / "flipped")
    # Under a checksum that is right.
    groups = generator.architecture.groups
    generator.architecture = dataclasses.replace(generator.architecture, groups=groups[:-1])
    generator.save(tmp_path / "forged")
    with pytest.raises(CheckpointError, match="contradicts itself"):
        MaskGenerator.load(tmp_path / "forged")
