"""Plans: the same channels of another checkpoint, exact, all or nothing."""

import dataclasses

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise
from reference.saved import NETWORKS, Mixed, Sized, assert_same_network, image, pruned
from reference.state import Frozen
from torch import nn

import stamp_fast
from stamp_fast import ArgumentError, CheckpointError, PruningPlan, checkpoint, pruning_plan, trace


@pytest.mark.parametrize("kind", NETWORKS)
def test_plan_cuts_another_checkpoint_of_the_same_network(kind, tmp_path):
    make, channels = NETWORKS[kind]
    model = pruned(make, channels)
    stamp_fast.save(model, tmp_path / "model")
    plan = stamp_fast.load_plan(tmp_path / "model")
    assert plan == stamp_fast.plan_of(model) == PruningPlan.from_json(plan.to_json())

    expected = randomise(make(), 7).eval()
    graph = trace(expected, image(channels))
    graph.settle()
    graph.compact(random_keep(graph, 0))

    other = randomise(make(), 7).eval().to(memory_format=torch.channels_last)
    objects = list(other.parameters())
    other(image(channels)).sum().backward()
    dense = {name: p.grad.clone() for name, p in other.named_parameters()}
    assert stamp_fast.apply_plan(other, plan) is other
    assert all(a is b for a, b in zip(objects, other.parameters(), strict=True))
    for name, parameter in other.named_parameters():
        for dim, index in enumerate(plan.kept.get(name, ())):
            if index is not None:
                dense[name] = dense[name].index_select(dim, torch.tensor(index))
        assert torch.equal(parameter.grad, dense[name])
    assert_same_network(other.to(memory_format=torch.contiguous_format), expected)
    assert torch.equal(other(image(channels)), expected(image(channels)))
    assert stamp_fast.plan_of(other) == plan


def wider() -> nn.Module:
    return Residual(width=12)


def without_bias() -> nn.Module:
    model = Residual()
    model.project = nn.Conv2d(8, 24, 1, stride=2, bias=False)
    return model


def with_more() -> nn.Module:
    model = Residual()
    model.extra = nn.Linear(2, 2)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wider, "'stem.0.weight' has shape (12, 1, 3, 3), in the dense Residual of the plan (8, 1, 3, 3)"),
        (without_bias, "the model has no 'project.bias'"),
        (with_more, "the model has 'extra.weight', the Residual of the plan has not"),
        (lambda: pruned(seed=3, times=2), "already pruned at 'stem.0'"),
        (Plain, "'conv1.weight'"),
    ],
)
def test_other_networks_are_refused(make, message, tmp_path):
    model = pruned()
    stamp_fast.save(model, tmp_path / "model")
    for refused in (
        lambda other: stamp_fast.load(other, tmp_path / "model"),
        lambda other: stamp_fast.apply_plan(other, stamp_fast.plan_of(model)),
    ):
        other = make()
        before = Frozen(other)
        with pytest.raises(CheckpointError) as error:
            refused(other)
        assert message in str(error.value)
        before.assert_same()


def test_what_is_no_plan():
    model = Plain()
    before = Frozen(model)
    for bad in (None, "plan.safetensors", model):
        with pytest.raises(ArgumentError, match="plan: expected one from plan_of or load_plan"):
            stamp_fast.apply_plan(model, bad)
    before.assert_same()
    for bad in (None, 3, model):
        with pytest.raises(CheckpointError, match="plan: expected JSON text"):
            PruningPlan.from_json(bad)


def test_plan_that_cuts_tied_weights_differently():
    model = pruned(Plain)
    plan = stamp_fast.plan_of(model)
    other = Plain()
    other.bn1.bias = other.bn1.weight
    kept = {**plan.kept, "bn1.bias": (tuple(range(len(plan.kept["bn1.weight"][0]))),)}
    before = Frozen(other)
    with pytest.raises(CheckpointError, match="'bn1.bias' is tied"):
        stamp_fast.apply_plan(other, dataclasses.replace(plan, kept=kept))
    before.assert_same()


def test_layer_changed_after_pruning(tmp_path):
    model = pruned()
    model.conv1.weight = nn.Parameter(torch.randn(3, 3, 3, 3))
    with pytest.raises(CheckpointError, match=r"'conv1.weight' had shape .* when it was pruned, now \(3, 3, 3, 3\)"):
        stamp_fast.save(model, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_lists_and_tuples_that_change():
    model = Residual()
    model.sizes, model.nested, model.scale = [8, 16], (8, [16, "x", None]), 0.5
    changed = {"sizes": ([8, 16], [5, 9]), "nested": ((8, [16, "x", None]), (5, [9, "x", None])), "scale": (0.5, 0.75)}
    plan = dataclasses.replace(stamp_fast.plan_of(model), attributes={"": changed})
    plan = PruningPlan.from_json(plan.to_json())
    stamp_fast.apply_plan(model, plan)
    assert (model.sizes, model.nested, model.scale) == ([5, 9], (5, [9, "x", None]), 0.75)
    assert type(model.nested) is tuple and stamp_fast.plan_of(model) == plan


def test_widths_in_attributes_of_the_model_are_in_the_plan():
    changed = stamp_fast.plan_of(pruned(Sized, 3)).attributes[""]
    assert changed["width"][0] == 16 > changed["width"][1]
    assert changed["sizes"][0] == [8, 24] and sum(changed["sizes"][1]) < 32


def test_failure_half_way_leaves_the_model_as_it_was(tmp_path, monkeypatch):
    model = pruned(Mixed, 3)
    stamp_fast.save(model, tmp_path / "model")
    plan = stamp_fast.plan_of(model)
    for module, run in (
        (checkpoint, lambda other: stamp_fast.load(other, tmp_path / "model")),
        (pruning_plan, lambda other: stamp_fast.apply_plan(other, plan)),
    ):
        for last in (0, 4, 9):
            other = randomise(Mixed(), 4).eval()
            other(image()).sum().backward()
            before = Frozen(other)
            calls = iter(range(last))
            original = module.replace_data

            def failing(tensor, data, calls=calls, original=original):
                if next(calls, None) is None:
                    raise MemoryError
                original(tensor, data)

            with monkeypatch.context() as patch:
                patch.setattr(module, "replace_data", failing)
                with pytest.raises(MemoryError):
                    run(other)
            before.assert_same()
        # and in the very last step
        other = Mixed()
        before = Frozen(other)
        with monkeypatch.context() as patch:
            patch.setattr(pruning_plan._history, "write", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run(other)
        before.assert_same()
