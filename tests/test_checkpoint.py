"""Files: what is saved comes back whole, and an older file outlives every failure."""

import copy
import os
import pickle
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from reference.networks import Plain, Residual
from reference.randomise import random_keep, randomise
from reference.saved import NETWORKS, Mixed, assert_same_network, image, pruned
from reference.state import Frozen
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import stamp_fast
from stamp_fast import ArgumentError, CheckpointError, trace


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


def test_file_replaced_between_its_check_and_its_reading(monkeypatch, tmp_path):
    """What was checked is what is read."""
    checked, other = tmp_path / "net.safetensors", tmp_path / "other.safetensors"
    model = nn.Linear(3, 4)
    stamp_fast.save(model, checked)
    stamp_fast.save(nn.Linear(3, 4), other)

    def replaced(path, framework):
        os.replace(other, checked)
        return safe_open(path, framework)

    monkeypatch.setattr("stamp_fast._files.safe_open", replaced)
    before = model.weight.clone()
    with pytest.raises(CheckpointError, match="replaced while it was read"):
        stamp_fast.load(model, checked)
    assert torch.equal(model.weight, before)
