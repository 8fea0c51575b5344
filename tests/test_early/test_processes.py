"""Early pruning in a training of several processes (gloo)."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train_run

from tests.processes import TIMEOUT, launch, spawn

_COUNTED = ("running_mean", "running_var", "num_batches_tracked")


def start(folder: Path, ranks: int, *options: str) -> list[subprocess.Popen]:
    return spawn([sys.executable, train_run.__file__, str(folder), *options], ranks)


def run(folder: Path, ranks: int, *options: str) -> list[dict]:
    """What every process ended with."""
    folder.mkdir(exist_ok=True)
    launch([sys.executable, train_run.__file__, str(folder), *options], ranks)
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(ranks)]


def assert_equal(one: dict, other: dict) -> None:
    """Bit by bit, but for statistics of the activations, which each process takes of its own images."""
    for state in (one, other):
        state["model"] = {name: value for name, value in state["model"].items() if not name.endswith(_COUNTED)}
    torch.testing.assert_close(one, other, rtol=0, atol=0)


KINDS = ("--plain", "--uneven", "--static_graph", "--find_unused_parameters", "--hook")


@pytest.mark.parametrize(("ranks", "options"), [(2, ()), (4, ()), *((2, (kind,)) for kind in KINDS)])
def test_every_process_cuts_the_same_and_goes_on(tmp_path, ranks, options):
    first, *others = run(tmp_path, ranks, *options)
    assert first["cut"] == train_run.CAP
    assert first["model"]["0.weight"].shape[0] < 16
    for other in others:
        assert_equal(other, first)


def test_a_process_that_dies_in_the_cut_leaves_a_checkpoint_to_go_on_from(tmp_path):
    expected = run(tmp_path / "whole", 2)
    folder = tmp_path / "killed"
    folder.mkdir()
    processes = start(folder, 2, "--die-in-the-cut=1")
    codes = []
    for process in processes:
        process.communicate(timeout=TIMEOUT)  # the other one does not wait for it forever
        codes.append(process.returncode)
    assert codes[1] == 9 and codes[0] != 0
    assert torch.load(folder / "checkpoint", weights_only=True)["epochs"] == train_run.CAP - 1
    found = run(folder, 2)
    for one, other in zip(found, expected, strict=True):
        assert_equal(one, other)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_cut_that_fails_in_one_process_is_made_in_none(tmp_path, failing):
    processes = start(tmp_path, 2, f"--fail-in-the-cut={failing}")
    outputs = []
    for process in processes:
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode != 0
        outputs.append(output)
    assert "on purpose" in outputs[failing]
    assert "failed in another process; nothing was changed" in outputs[1 - failing]
    for rank in range(2):
        state = torch.load(tmp_path / f"failed-{rank}.pt", weights_only=True)
        assert state["0.weight"].shape[0] == 16
