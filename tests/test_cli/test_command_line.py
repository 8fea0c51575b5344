"""As a user runs it: another process, their own folder, nothing but the installed command."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import stamp_fast
from stamp_fast.cli import main

ROOT = Path(stamp_fast.__file__).resolve().parents[1]


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # -P: as with the installed script, the current folder is not on the path by itself.
    return subprocess.run(
        [sys.executable, "-P", "-m", "stamp_fast", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        text=True,
        capture_output=True,
    )


def test_prune_in_a_folder_of_ones_own(tmp_path):
    (tmp_path / "mymodel.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "def make():\n    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))\n\n"
        "def loader():\n    return [(torch.randn(4, 1, 8, 8), torch.arange(4))]\n"
    )
    done = run(tmp_path, "prune", "mymodel:make", "mymodel:loader", "--steps", "2", "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["output"] == "small.safetensors" and report["macs_after"] < report["macs_before"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["mymodel.py", "small.safetensors"]
    assert done.stderr == ""  # no notes, no bar that a log would be full of


@pytest.mark.parametrize("command", ["inspect", "prune", "bench", "demo"])
def test_help_has_examples_and_exit_codes(command):
    text = CliRunner().invoke(main, [command, "--help"]).output
    assert f"stamp-fast {command}" in text or command == "demo"
    top = CliRunner().invoke(main, ["--help"]).output
    assert command in top and "Exit codes" in top
    assert "..." not in top.split("Commands:")[1]
