"""Meta-training: repeats, resumes, spreads over processes, leaves the model alone, and learns."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import meta_train_run
import pytest
import torch
from meta_train_run import SCHEDULE, reference
from safetensors import safe_open
from torch import nn
from torch.utils.data import TensorDataset

from stamp_fast import ArgumentError, CheckpointError, LoaderError, ModelError
from stamp_fast.stamp import MaskGenerator, meta_train

SHORT = SCHEDULE | {"tasks": 6, "tasks_per_update": 3}


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    torch.set_num_threads(1)


def trained(**options) -> MaskGenerator:
    model, dataset = reference()
    return meta_train(model, dataset, progress=False, **SHORT | options)


def assert_same(one: MaskGenerator, other: MaskGenerator, **tolerance) -> None:
    for name, value in one.state_dict().items():
        if tolerance:
            torch.testing.assert_close(other.state_dict()[name], value, **tolerance)
        else:
            assert torch.equal(value, other.state_dict()[name]), name


@pytest.mark.parametrize("options", [{}, {"outer": "reptile"}, {"mode": "structure"}, {"encoder": "input"}], ids=str)
def test_seeded_runs_repeat_and_learn_something(options):
    first = trained(**options)
    torch.randn(5)
    assert_same(first, trained(**options))
    other = trained(**options, seed=1)
    start = trained(**options, tasks=1, lr=1e-12)
    for name, value in first.named_parameters():
        moved = (value - dict(start.named_parameters())[name]).abs().max()
        # Reptile moves what the steps adapt; only the activations make codes of a set.
        still = ("allocation_of_set",) * ("encoder" in options) + ("encoder", "allocation_of_set") * (
            "outer" in options
        )
        assert moved > 0 or name.startswith(still), name
    assert not torch.equal(first.beta, other.beta)


def test_the_model_is_left_as_it_was():
    model, dataset = reference()
    model.train()
    model[0].weight.requires_grad_(False)
    model[1].weight.grad = torch.ones(8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    meta_train(model, dataset, progress=False, **SHORT)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not model[0].weight.requires_grad and torch.equal(model[1].weight.grad, torch.ones(8))


class Fails(TensorDataset):
    def __getitem__(self, i):
        if time.monotonic() > self.until:
            raise OSError("the disk is gone")
        return super().__getitem__(i)


def test_the_model_is_left_as_it_was_by_a_failure():
    model, dataset = reference()
    failing = Fails(*dataset.tensors)
    failing.until = time.monotonic() + 1.0
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(Exception, match="the disk is gone"):
        meta_train(model, failing, progress=False, **SCHEDULE | {"tasks": 100_000})
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def run(*arguments: str, wait: bool = True, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    command = [sys.executable, *launcher, meta_train_run.__file__, *map(str, arguments)]
    process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if wait:
        assert process.wait(240) == 0
    return process


def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path):
    run(tmp_path / "whole")
    killed = run(tmp_path / "killed", tmp_path / "checkpoint", "--slow", wait=False)
    deadline = time.monotonic() + 120
    while not (tmp_path / "checkpoint").exists():
        assert time.monotonic() < deadline and killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait(30) == -signal.SIGKILL
    assert not (tmp_path / "killed.0").exists()
    with safe_open(tmp_path / "checkpoint", "pt") as file:
        assert 0 < int(file.metadata()["updates"]) < 6
    run(tmp_path / "killed", tmp_path / "checkpoint")
    assert_same(MaskGenerator.load(tmp_path / "whole.0"), MaskGenerator.load(tmp_path / "killed.0"))


def test_two_processes_find_what_one_finds(tmp_path: Path):
    run(tmp_path / "one")
    run(tmp_path / "two", launcher=("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"))
    one, first, second = (MaskGenerator.load(tmp_path / name) for name in ("one.0", "two.0", "two.1"))
    assert_same(first, second)
    # Floats are added up in another order.
    assert_same(one, first, rtol=1e-3, atol=1e-4)


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path):
    path = tmp_path / "c"
    trained(checkpoint=path)
    with pytest.raises(CheckpointError, match="was made with other lr, seed"):
        trained(checkpoint=path, lr=0.5, seed=3)
    model, dataset = reference()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    with pytest.raises(CheckpointError, match="was made with other weights"):
        meta_train(model, dataset, checkpoint=path, progress=False, **SHORT)
    model, (images, labels) = reference()[0], dataset.tensors
    with pytest.raises(CheckpointError, match="was made with other labels"):
        meta_train(model, TensorDataset(images, labels.flip(0)), checkpoint=path, progress=False, **SHORT)
    model[0], model[1] = nn.Conv2d(1, 9, 3, padding=1), nn.BatchNorm2d(9)
    model[4] = nn.Conv2d(9, 12, 3, stride=2)
    with pytest.raises(CheckpointError, match="is for another network: it has '0' with 8 channel classes"):
        meta_train(model, dataset, checkpoint=path, progress=False, **SHORT)


def test_a_finished_run_is_read_from_its_checkpoint(tmp_path: Path):
    first = trained(checkpoint=tmp_path / "c")
    assert_same(first, trained(checkpoint=tmp_path / "c"))


def test_more_tasks_lower_the_query_loss(capsys):
    """The generator of a network in which half of the channels are noise learns to close those."""
    model, dataset = reference()
    with torch.no_grad():
        model[0].weight[4:] *= 3  # large, and of no use: what reads them is noise
        model[4].weight[:, 4:] = 0.02 * torch.randn(12, 4, 3, 3)
    options = SCHEDULE | {"tasks": 160, "lr": 0.05, "mode": "structure", "inner_steps": 1}
    generator = meta_train(model, dataset, progress=False, **options)
    start = meta_train(model, dataset, progress=False, **options | {"tasks": 1, "lr": 1e-12})
    # The useful channels gained on the useless ones.
    gain = generator.beta[:8] - start.beta[:8]
    assert gain[:4].mean() > gain[4:].mean()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"outer": "maml"}, "outer: must be one of first_order, reptile, got 'maml'"),
        ({"tasks": 0}, "tasks: must be a whole number of at least 1, got 0"),
        ({"budgets": (0.5, 0.1)}, "budgets: must be two fractions"),
        ({"budgets": 0.5}, "budgets: must be two fractions"),
        ({"budgets": (0.5,)}, "budgets: must be two fractions"),
        ({"classes": 3}, "classes: must be two whole numbers from 2"),
        ({"classes": (1, 3)}, "classes: must be two whole numbers from 2"),
        ({"lr": -1}, "lr: must be a positive number, got -1"),
        ({"lr": "a"}, "lr: must be a positive number"),
        ({"seed": None}, "seed: must be a whole number of at least 0, got None"),
        ({"seed": 2**70}, "seed: must be a whole number"),
        ({"head_steps": -1}, "head_steps: must be a whole number of at least 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: must be a whole number of at least 1"),
        ({"task": 5}, "task: meta_train has no such argument"),
        ({"encoder": "pixels"}, "encoder: must be one of"),
        ({"mode": "both"}, "mode: must be one of joint, structure"),
        ({"classes": (2, 50), "shots": 11}, "0 classes have the 15 examples"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ArgumentError, match=match):
        trained(**options)


def test_a_head_that_is_too_small():
    model, dataset = reference()
    model[-1] = nn.Linear(48, 2)
    with pytest.raises(ArgumentError, match="needs|one logit for each"):
        meta_train(model, dataset, progress=False, **SHORT)


def test_progress_says_loss_macs_and_rate(capsys):
    model, dataset = reference()
    meta_train(model, dataset, progress=True, **SHORT)
    shown = capsys.readouterr().err
    assert "loss=" in shown and "macs=" in shown and "tasks/s" in shown


def test_schedule_is_in_the_checkpoint(tmp_path: Path):
    trained(checkpoint=tmp_path / "c")
    with safe_open(tmp_path / "c", "pt") as file:
        assert json.loads(file.metadata()["schedule"])["tasks"] == 6


def test_flags_of_the_model_make_no_difference():
    """A model in eval mode, and a frozen one, learn as `prune` will adapt them: in training mode, all of it."""
    generators = []
    for train, frozen in ((False, False), (True, False), (False, True)):
        model, dataset = reference()
        model.train(train).requires_grad_(not frozen)
        generators.append(meta_train(model, dataset, progress=False, **SHORT))
        assert model.training == train
        assert all(p.requires_grad != frozen for p in model.parameters())
    for other in generators[1:]:
        assert_same(generators[0], other)


def test_inputs_that_are_not_finite():
    model, dataset = reference()
    dataset.tensors[0][:] = float("inf")
    with pytest.raises(LoaderError, match="dataset: the loss of a task is nan; check its inputs"):
        meta_train(model, dataset, progress=False, **SHORT)


def test_nothing_to_prune():
    model, dataset = reference()
    with pytest.raises(ModelError, match="nothing to prune"):
        meta_train(nn.Sequential(nn.Flatten(), nn.Linear(dataset[0][0].numel(), 8)), dataset, progress=False, **SHORT)
