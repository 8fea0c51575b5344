"""Files: what is saved comes back whole, nothing else is accepted, and an older file outlives every failure."""

import copy
import dataclasses
import io
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise
from reference.state import Frozen
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import stamp_fast
from stamp_fast import ArgumentError, CheckpointError, PruningPlan, checkpoint, pruning_plan, trace


class Mixed(nn.Module):
    """Concatenation, grouped and depthwise convolutions, tied weights, buffers kept and not kept, GRU, LayerNorm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, width, 3, padding=1)
        self.right = nn.Conv2d(3, width, 3, padding=1)
        self.grouped = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=4)
        self.depthwise = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width)
        self.twin1 = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.twin2 = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.twin2.weight = self.twin1.weight
        self.register_buffer("shift", torch.linspace(-1, 1, 2 * width).view(1, -1, 1, 1))
        self.register_buffer("gain", torch.linspace(1, 2, 2 * width).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("steps", torch.arange(5), persistent=False)
        self.register_buffer("cache", None, persistent=False)
        self.norm = nn.LayerNorm(2 * width)
        self.gru = nn.GRU(2 * width, 12, batch_first=True)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        x = torch.relu(self.depthwise(self.grouped(x)))
        x = x + torch.relu(self.twin1(x)) * self.gain
        x = x + torch.relu(self.twin2(x)) + self.shift
        x = self.norm(x.mean((2, 3)))
        return self.head(self.gru(x[:, None])[0][:, -1])


class Sized(nn.Module):
    """Keeps widths in attributes of its own, as many networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.sizes = 16, [8, 24]
        self.stem = nn.Conv2d(3, 16, 3)
        self.split = nn.Conv2d(16, 32, 1)
        self.small = nn.Conv2d(8, 6, 1)
        self.large = nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = x.view(x.shape[0], self.width, x.shape[2], x.shape[3])
        small, large = torch.split(torch.relu(self.split(x)), self.sizes, 1)
        return (self.small(small) + self.large(large)).mean((2, 3))


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


NETWORKS = {"plain": (Plain, 1), "residual": (Residual, 1), "mixed": (Mixed, 3), "sized": (Sized, 3)}


def pruned(make=Residual, channels: int = 1, times: int = 1, seed: int = 0) -> nn.Module:
    model = randomise(make(), seed).eval()
    for i in range(times):
        graph = trace(model, image(channels))
        graph.settle()
        graph.compact(random_keep(graph, i))
    return model


def numbers(module: nn.Module) -> dict:
    return {k: v for k, v in module.__dict__.items() if isinstance(v, (bool, int, float, list, tuple, str))}


def tables(module: nn.Module) -> dict:
    return {**module._parameters, **module._buffers}


def assert_same_network(actual: nn.Module, expected: nn.Module) -> None:
    """Bits, strides, dtypes, ties, flags and every number that a module holds."""
    assert type(actual) is type(expected)
    first: dict[int, str] = {}
    others: dict[int, str] = {}
    pairs = zip(actual.named_modules(), expected.named_modules(), strict=True)
    for (name, module), (same_name, other) in pairs:
        assert name == same_name
        skip = ("_flat_weights", "_flat_weight_refs", "_is_torch_compile")
        mine, theirs = ({k: v for k, v in numbers(m).items() if k not in skip} for m in (module, other))
        assert mine == theirs, name
        assert tables(module).keys() == tables(other).keys()
        for key, tensor in tables(module).items():
            wanted = tables(other)[key]
            if wanted is None:
                assert tensor is None
                continue
            assert torch.equal(tensor, wanted), f"{name}.{key}"
            assert (tensor.dtype, tensor.stride(), tensor.requires_grad) == (
                wanted.dtype,
                wanted.stride(),
                wanted.requires_grad,
            ), f"{name}.{key}"
            assert type(tensor) is type(wanted)
            assert first.setdefault(id(tensor), f"{name}.{key}") == others.setdefault(id(wanted), f"{name}.{key}")


# --- round trips ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("times", [0, 1, 3])
@pytest.mark.parametrize("kind", NETWORKS)
def test_what_is_saved_comes_back(kind, times, tmp_path):
    make, channels = NETWORKS[kind]
    model = pruned(make, channels, times)
    stamp_fast.save(model, tmp_path / "model")
    for given_ in (make, lambda: randomise(make(), 9), make().train(), pruned(make, channels, times)):
        loaded = stamp_fast.load(given_, tmp_path / "model")
        assert given_ is loaded or not isinstance(given_, nn.Module)
        assert_same_network(loaded, model)
        assert torch.equal(loaded(image(channels)), model(image(channels)))
        assert stamp_fast.plan_of(loaded) == stamp_fast.plan_of(model)
    assert (sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in make().parameters())) == bool(times)


def test_after_prune_and_a_cut_by_hand(tmp_path):
    loader = [(torch.randn(8, 1, 8, 8), torch.arange(8))]
    model = pruned(Plain)
    stamp_fast.prune(model, loader, method="magnitude", budget=stamp_fast.Budget(channels=0.7), progress=False)
    stamp_fast.save(model, tmp_path / "model")
    assert_same_network(stamp_fast.load(Plain, tmp_path / "model"), model)


def test_compact_goes_on_after_loading(tmp_path):
    model = pruned()
    stamp_fast.save(model, tmp_path / "model")
    loaded = stamp_fast.load(Residual, tmp_path / "model")
    for network in (model, loaded):
        graph = trace(network, image(1))
        graph.compact(random_keep(graph, 5))
    assert stamp_fast.plan_of(loaded) == stamp_fast.plan_of(model)
    assert_same_network(loaded, model)


@pytest.mark.parametrize(
    "copied",
    [
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: copy.deepcopy(model).to(torch.float64).to(torch.float32),
    ],
)
def test_copies_can_be_saved(copied, tmp_path):
    model = pruned(Mixed, 3, 2)
    stamp_fast.save(copied(model), tmp_path / "model")
    assert_same_network(stamp_fast.load(Mixed, tmp_path / "model"), model)


def test_part_of_another_network_and_a_new_head(tmp_path):
    """The record sits on the modules: it goes where they go, and leaves with a layer that is replaced."""

    def whole(backbone: nn.Module) -> nn.Module:
        return nn.Sequential(backbone, nn.ReLU(), nn.Linear(10, 3))

    model = whole(pruned())
    stamp_fast.save(model, tmp_path / "model")
    assert_same_network(stamp_fast.load(lambda: whole(Residual()), tmp_path / "model"), model)

    model[0].head = nn.Linear(model[0].head.in_features, 10)
    width = model[0].head.in_features

    def with_new_head() -> nn.Module:
        model = whole(Residual())
        model[0].head = nn.Linear(width, 10)
        return model

    stamp_fast.save(model, tmp_path / "model")
    assert_same_network(stamp_fast.load(with_new_head, tmp_path / "model").eval(), model.eval())


def test_average_that_was_cut_along(tmp_path):
    model = randomise(Residual())
    average = torch.optim.swa_utils.AveragedModel(model)
    graph = trace(model, image(1))
    graph.compact(random_keep(graph), ema=average)
    stamp_fast.save(average, tmp_path / "average")
    loaded = stamp_fast.load(lambda: torch.optim.swa_utils.AveragedModel(Residual()), tmp_path / "average")
    assert_same_network(loaded, average)
    assert stamp_fast.plan_of(average.module) == stamp_fast.plan_of(model)


def test_dtype_memory_format_and_flags(tmp_path):
    model = pruned().to(memory_format=torch.channels_last).to(torch.bfloat16).train()
    model.bn1.eval()
    model.bn1.weight.requires_grad_(False)
    model.stem.requires_grad_(False)
    stamp_fast.save(model, tmp_path / "model")
    loaded = stamp_fast.load(Residual, tmp_path / "model")
    assert loaded.conv1.weight.stride()[1] == 1 and not loaded.bn1.training and loaded.bn2.training
    assert_same_network(loaded, model)


def test_ties_made_after_construction(tmp_path):
    def untied() -> nn.Module:
        return nn.ModuleDict(
            {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4), "d": nn.Linear(4, 4), "r": nn.GRU(4, 4)}
        )

    model = untied()
    model.b.weight = model.a.weight
    model.c.weight.data = model.a.weight.data  # the same memory, two parameters
    model.d.weight = model.c.weight
    model.register_buffer("part", model.a.bias.detach()[:2])  # a part of the same memory
    model.r.weight_hh_l0 = model.r.weight_ih_l0

    def with_part() -> nn.Module:
        fresh = untied()
        fresh.register_buffer("part", torch.zeros(2))
        return fresh

    stamp_fast.save(model, tmp_path / "model")
    loaded = stamp_fast.load(with_part, tmp_path / "model")
    assert_same_network(loaded, model)
    assert loaded.c.weight.data_ptr() == loaded.a.weight.data_ptr()
    assert all(
        a is loaded.r._parameters[n] for n, a in zip(loaded.r._flat_weights_names, loaded.r._flat_weights, strict=True)
    )
    assert loaded.r._flat_weights[0] is loaded.r._flat_weights[1] is loaded.r.weight_hh_l0

    tied = with_part()
    tied.a.bias = tied.b.bias
    before = Frozen(tied)
    with pytest.raises(CheckpointError, match="'b.bias' and 'a.bias' are one tensor in the model and two in the file"):
        stamp_fast.load(tied, tmp_path / "model")
    before.assert_same()


def test_caches_that_a_forward_fills(tmp_path):
    model = pruned(Mixed, 3)
    model.cache = torch.arange(7.0)
    model.steps += 1
    stamp_fast.save(model, tmp_path / "model")
    loaded = stamp_fast.load(Mixed, tmp_path / "model")
    assert torch.equal(loaded.cache, model.cache) and torch.equal(loaded.steps, model.steps)
    assert "cache" not in loaded.state_dict() and loaded.gain.shape == model.gain.shape


def test_factory_on_the_meta_device(tmp_path):
    model = pruned(Mixed, 3)
    stamp_fast.save(model, tmp_path / "model")

    def on_meta() -> nn.Module:
        with torch.device("meta"):
            return Mixed()

    loaded = stamp_fast.load(on_meta, tmp_path / "model")
    assert_same_network(loaded, model)
    assert torch.equal(loaded(image()), model(image()))


def test_wrappers_are_looked_into(tmp_path):
    model = pruned()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        wrapped = [
            torch.compile(model),
            nn.DataParallel(model),
            torch.compile(nn.parallel.DistributedDataParallel(model)),
        ]
        for i, wrapper in enumerate(wrapped):
            stamp_fast.save(wrapper, tmp_path / f"{i}")
            assert_same_network(stamp_fast.load(Residual, tmp_path / f"{i}"), model)
    finally:
        torch.distributed.destroy_process_group()
    compiled = torch.compile(Residual())
    assert stamp_fast.load(compiled, tmp_path / "0") is compiled
    assert_same_network(compiled._orig_mod, model)
    model.stem = torch.compile(model.stem)
    stamp_fast.save(model, tmp_path / "inner")
    loaded = stamp_fast.load(Residual, tmp_path / "inner")
    assert torch.equal(loaded.stem[0].weight, model.stem._orig_mod[0].weight)


def test_other_readers_can_open_the_file(tmp_path):
    model = pruned()
    stamp_fast.save(model, tmp_path / "model.safetensors")
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


# --- plans ------------------------------------------------------------------------------------------------------------
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


# --- hostile files ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Path, bytes, nn.Module]:
    path = tmp_path_factory.mktemp("small") / "model"
    stamp_fast.save(pruned(lambda: Residual(width=2)), path)
    return path, path.read_bytes(), Residual(width=2)


def refuse(path: Path, model: nn.Module, message: str = "") -> None:
    before = Frozen(model)
    with pytest.raises(CheckpointError) as error:
        stamp_fast.load(model, path)
    before.assert_same()
    assert message in str(error.value) and str(path) in str(error.value)


QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(data=st.data())
def test_truncated_anywhere(data, small, tmp_path):
    _, content, model = small
    (tmp_path / "cut").write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refuse(tmp_path / "cut", model)


@QUICK
@given(data=st.data())
def test_any_bit_flipped(data, small, tmp_path):
    _, content, model = small
    header = int.from_bytes(content[:8], "little")
    position = data.draw(st.one_of(st.integers(0, 8 + header - 1), st.integers(0, len(content) - 1)))
    damaged = bytearray(content)
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (tmp_path / "flipped").write_bytes(damaged)
    refuse(tmp_path / "flipped", model)
    with pytest.raises(CheckpointError):
        stamp_fast.load_plan(tmp_path / "flipped")


@QUICK
@given(content=st.binary(max_size=200))
def test_any_bytes(content, small, tmp_path):
    (tmp_path / "noise").write_bytes(content)
    refuse(tmp_path / "noise", small[2])


class Bomb:
    def __reduce__(self):
        return (os.abort, ())


def test_files_of_other_kinds(small, tmp_path):
    _, content, model = small
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign", {"format": "pt"})
    refuse(tmp_path / "foreign", model, "was not written by stamp_fast.save")
    save_file({"sha256": torch.zeros(2)}, tmp_path / "foreign", {"plan": "{}", "state": '"sha256":"' + 64 * "0"})
    refuse(tmp_path / "foreign", model, "was not written by stamp_fast.save")
    buffer = io.BytesIO()
    torch.save(model, buffer)
    for name, other in (("zip", buffer.getvalue()), ("pickle", pickle.dumps(Bomb())), ("text", b"x" * 999)):
        (tmp_path / name).write_bytes(other)
        refuse(tmp_path / name, model, "is not a safetensors file")
    (tmp_path / "empty").touch()
    refuse(tmp_path / "empty", model, "is not a safetensors file, or cut off")
    (tmp_path / "folder").mkdir()
    refuse(tmp_path / "folder", model, "is not a file")
    refuse(tmp_path / "none", model, "there is no such file")
    refuse(tmp_path / "empty" / "below", model, "there is no such file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", model, "is not a file")
    with open(tmp_path / "sparse", "wb") as file:  # a header of 40 GB, said and there
        file.write((40 << 30).to_bytes(8, "little") + b"{")
        file.truncate((40 << 30) + 8)
    refuse(tmp_path / "sparse", model, "has a header of")
    with pytest.raises(ArgumentError, match="path: expected a str"):
        stamp_fast.load(model, 3)
    with pytest.raises(ArgumentError, match="expected a module or a function"):
        stamp_fast.load("model", tmp_path / "empty")
    with pytest.raises(ArgumentError, match="the factory gave int, expected"):
        stamp_fast.load(lambda: 3, tmp_path / "empty")


def forged(path: Path, change, tensors=None) -> None:
    """Another plan, state and tensors under a checksum that is right."""
    model = pruned(lambda: Residual(width=2))
    stamp_fast.save(model, path)
    with checkpoint.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        stored = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    plan, state = json.loads(metadata["plan"]), json.loads(metadata["state"])
    texts = change(plan, state)
    plan, state = texts if isinstance(texts, tuple) else (plan, state)
    texts = {"plan": plan, "state": state}
    texts = {key: text if isinstance(text, str) else json.dumps(text) for key, text in texts.items()}
    stored.update(tensors or {})
    checkpoint._write({k: v for k, v in stored.items() if v is not None}, {**metadata, **texts}, str(path))


def put_in(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(plan, state):
        place = {"plan": plan, "state": state}
        for key in keys:
            place = place[key]
        place[last] = value

    return change


def attribute(module, name, *values):
    return put_in("plan", "attributes", module, {name: list(values)})


FORGERIES = {
    "not an object": (lambda p, s: ([1], s), "plan: expected an object"),
    "a key missing": (lambda p, s: (p.pop("kept"), None)[1], "plan: expected an object"),
    "a key too many": (put_in("plan", "code", "print(1)"), "plan: expected an object"),
    "no JSON": (lambda p, s: ("{'format': 1}", s), "plan: is not JSON"),
    "deep": (lambda p, s: ("[" * 200_000, s), "plan: is not JSON"),
    "long": (lambda p, s: ("[" + "[]," * 7_000_000 + "[]]", s), "plan: is 21000004 characters long"),
    "long number": (lambda p, s: ('{"format": ' + "9" * 10_000 + "}", s), "plan: is not JSON"),
    "later format": (put_in("plan", "format", 2), "has format 2"),
    "model": (put_in("plan", "model", ["x"]), "'model' is not a name"),
    "shapes": (put_in("plan", "shapes", [1]), "'shapes' is not an object"),
    "shape": (put_in("plan", "shapes", "conv1.weight", [1.0]), "shapes: 'conv1.weight'"),
    "huge shape": (put_in("plan", "shapes", "conv1.weight", [10**15] * 4), "'conv1.weight' has shape"),
    "huge dense shape": (put_in("plan", "shapes", "head.bias", [10**15]), "'head.bias' has shape (10,)"),
    "negative shape": (put_in("plan", "shapes", "conv1.weight", [-1, 2, 3, 3]), "shapes: 'conv1.weight'"),
    "other tensor": (put_in("plan", "shapes", "nothing.weight", [2]), "no 'nothing.weight'"),
    "indices": (put_in("plan", "indices", {"a": 1}), "'indices' is not a list"),
    "empty": (put_in("plan", "indices", 0, []), "indices: list 0"),
    "negative": (put_in("plan", "indices", 0, [-1, 0]), "indices: list 0"),
    "twice": (put_in("plan", "indices", 0, [0, 0]), "indices: list 0 is not ascending"),
    "falling": (put_in("plan", "indices", 0, [1, 0]), "indices: list 0 is not ascending"),
    "float": (put_in("plan", "indices", 0, [0.0]), "indices: list 0"),
    "bool": (put_in("plan", "indices", 0, [False, True]), "indices: list 0"),
    "nested": (put_in("plan", "indices", 0, [[0]]), "indices: list 0"),
    "beyond": (put_in("plan", "indices", 0, [0, 10**30]), "keeps a position beyond"),
    "no such list": (put_in("plan", "kept", "conv1.weight", [99, None, None, None]), "positions that are not there"),
    "negative list": (put_in("plan", "kept", "conv1.weight", [-1, None, None, None]), "positions that are not there"),
    "dims": (put_in("plan", "kept", "conv1.weight", [0]), "one entry per dim"),
    "kept of nothing": (put_in("plan", "kept", "nothing", [0]), "'nothing' has no shape"),
    "__class__": (attribute("conv1", "__class__", 1, 2), "no number or list '__class__'"),
    "__dict__": (attribute("conv1", "__dict__", [], []), "no number or list '__dict__'"),
    "forward": (attribute("conv1", "forward", 1, 2), "no number or list 'forward'"),
    "_parameters": (attribute("conv1", "_parameters", [], []), "no number or list '_parameters'"),
    "training": (attribute("conv1", "training", 1, 0), "no number or list 'training'"),
    "bool value": (attribute("conv1", "training", True, False), "changes from True to False"),
    "new attribute": (attribute("conv1", "new", 1, 2), "no number or list 'new'"),
    "padding_mode": (attribute("conv1", "padding_mode", "zeros", "circular"), "changes from 'zeros'"),
    "type": (attribute("conv1", "out_channels", 4, "4"), "changes from 4 to '4'"),
    "float for int": (attribute("conv1", "out_channels", 4, 3.0), "changes from 4 to 3.0"),
    "list for int": (attribute("conv1", "out_channels", 4, [3]), "changes from 4 to [3]"),
    "length": (attribute("conv1", "kernel_size", {"tuple": [3, 3]}, {"tuple": [3]}), "changes from (3, 3)"),
    "list for tuple": (attribute("conv1", "kernel_size", {"tuple": [3, 3]}, [3, 3]), "changes from (3, 3)"),
    "dict": (attribute("conv1", "out_channels", {"a": 1}, {"a": 1}), "neither a number nor a list"),
    "infinity": (attribute("conv1", "out_channels", 1e999, 1e999), "neither a number nor a list"),
    "huge int": (attribute("conv1", "out_channels", 4, 10**40), "changes from 4"),
    "one value": (attribute("conv1", "out_channels", 4), "a dense and a new value"),
    "other dense value": (attribute("conv1", "out_channels", 5, 4), "is 4, in the dense Residual of the plan 5"),
    "no module": (attribute("nothing", "out_channels", 4, 3), "no module 'nothing'"),
    "deep value": (attribute("conv1", "padding", [[[[[[[[[[1]]]]]]]]]], 1), "nested too deeply"),
    "state": (lambda p, s: (p, "[]"), "state: expected an object"),
    "frozen": (put_in("state", "frozen", ["bn1.running_mean"]), "no parameter 'bn1.running_mean'"),
    "frozen type": (put_in("state", "frozen", "all"), "'frozen' is not a list"),
    "eval": (put_in("state", "eval", ["nothing"]), "no module 'nothing'"),
    "memory format": (put_in("state", "memory_format", {"conv1.weight": "sparse"}), "unknown memory format 'sparse'"),
    "memory format of": (put_in("state", "memory_format", {"bn1.weight": "channels_last"}), "not one for 1 dims"),
    "tie of stored": (put_in("state", "tied", {"bn1.weight": "bn1.bias"}), "stored and tied"),
    "tie type": (put_in("state", "tied", {"a": 1}), "'tied' does not map"),
    "tie of tied": (lambda p, s: s["tied"].update({"bn1.weight": "bn2.weight", "bn2.weight": "bn1.bias"}), "tie"),
    "tie of nothing": (put_in("state", "tied", {"a": "b"}), "ties 'a' to 'b'"),
}


@pytest.mark.parametrize("kind", FORGERIES)
def test_forged_plan_is_refused(kind, small, tmp_path):
    change, message = FORGERIES[kind]
    forged(tmp_path / "forged", change)
    refuse(tmp_path / "forged", small[2], message)


@pytest.mark.parametrize(
    ("shared", "tensors", "message"),
    [
        ({}, {"conv1.weight": torch.zeros(1, 1, 1, 1)}, "'conv1.weight' has shape (1, 1, 1, 1) in the file"),
        ({}, {"more": torch.zeros(1)}, "the model has no parameter or buffer 'more'"),
        ({}, {"head.bias": torch.zeros(10, dtype=torch.int64)}, "'head.bias' is torch.int64 in the file"),
        ({}, {"head.bias": None}, "has no tensor for 'head.bias'"),
        ({"bn1.running_mean": "bn1.bias"}, {"bn1.running_mean": None}, "not of one kind and shape"),
        ({"head.bias": "bn1.bias"}, {"head.bias": None}, "not of one kind and shape"),
        ({"head.bias": "nothing"}, {"head.bias": None}, "has no tensor for 'head.bias'"),
    ],
)
def test_forged_tensors_are_refused(shared, tensors, message, small, tmp_path):
    forged(tmp_path / "forged", put_in("state", "shared", shared), tensors)
    refuse(tmp_path / "forged", small[2], message)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_json_in_any_place_of_a_plan(data):
    """Whatever stands there, it is refused with the typed error or is a plan that says the same when written again."""
    plan = json.loads(SOME_PLAN)
    place, key = plan, data.draw(st.sampled_from(sorted(plan)))
    while isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(JSON)
    try:
        read = PruningPlan.from_json(json.dumps(plan))
    except CheckpointError:
        return
    assert PruningPlan.from_json(read.to_json()) == read
    model = Residual(width=2)
    before = Frozen(model)
    try:
        read.check_fits(model)
    except CheckpointError:
        before.assert_same()


SOME_PLAN = stamp_fast.plan_of(pruned(lambda: Residual(width=2))).to_json()


# --- writing ----------------------------------------------------------------------------------------------------------
class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}


def test_what_cannot_be_saved(tmp_path):
    with torch.device("meta"):
        meta = Plain()
    odd = pruned()
    odd.conv1.__dict__["_stamp_fast_cut"]["attributes"]["odd"] = 1
    odd.conv1.odd = {1, 2}
    sparse = nn.Module()
    sparse.register_buffer("table", torch.eye(2).to_sparse())
    for model, message in (
        (meta, "'conv1.weight' lies on the meta device"),
        (nn.Sequential(Stateful(2, 2)), "'0' has extra state of its own"),
        (odd, "attribute 'conv1.odd' changed to {1, 2}"),
        (sparse, "'table' is torch.sparse_coo"),
    ):
        with pytest.raises(CheckpointError) as error:
            stamp_fast.save(model, tmp_path / "model")
        assert message in str(error.value)
    with pytest.raises(ArgumentError, match="path"):
        stamp_fast.save(Plain(), None)
    assert not list(tmp_path.iterdir())


def test_failed_write_keeps_the_old_file_and_leaves_no_litter(tmp_path, monkeypatch):
    model = pruned()
    stamp_fast.save(model, tmp_path / "model")
    old = (tmp_path / "model").read_bytes()
    larger = randomise(Plain())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))  # as on a full disk: a write stops half-way
    try:
        with pytest.raises(CheckpointError, match="cannot write"):
            stamp_fast.save(larger, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    for name, problem in (("fsync", OSError(28, "No space left on device")), ("replace", KeyboardInterrupt())):
        with monkeypatch.context() as patch:

            def fail(*args, problem=problem):
                raise problem

            patch.setattr(os, name, fail)
            with pytest.raises(CheckpointError if isinstance(problem, OSError) else KeyboardInterrupt):
                stamp_fast.save(larger, tmp_path / "model")
    (tmp_path / "folder").mkdir()
    with pytest.raises(CheckpointError, match="directory"):
        stamp_fast.save(model, tmp_path / "folder")
    with pytest.raises(CheckpointError, match="cannot write"):
        stamp_fast.save(model, tmp_path / "none" / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "model"]
    assert (tmp_path / "model").read_bytes() == old


def test_symbolic_links_and_permissions_stay(tmp_path):
    stamp_fast.save(Plain(), tmp_path / "model")
    (tmp_path / "model").chmod(0o640)
    (tmp_path / "latest").symlink_to("model")
    stamp_fast.save(pruned(), tmp_path / "latest")
    assert (tmp_path / "latest").is_symlink() and (tmp_path / "model").stat().st_mode & 0o777 == 0o640
    assert_same_network(stamp_fast.load(Residual, tmp_path / "model"), pruned())


def test_killed_in_mid_write(tmp_path):
    model = pruned()
    stamp_fast.save(model, tmp_path / "model")
    script = """
        import os, sys, time
        import stamp_fast
        from torch import nn

        def stop(descriptor):
            print("writing", flush=True)
            time.sleep(60)

        os.fsync = stop
        stamp_fast.save(nn.Linear(100, 100), sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "model")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert_same_network(stamp_fast.load(Residual, tmp_path / "model"), model)
