"""The programs in examples/ run to their end."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import TIMEOUT, launch

EXAMPLES = Path(__file__).parent.parent / "examples"
CHANCE = 0.1  # ten digits
METAPRUNING = [sys.executable, str(EXAMPLES / "metapruning_imagenet.py"), "--fake", "--out"]


def output_of(name: str, *options: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *options], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(pattern: str, output: str) -> list[float]:
    """What the groups of the pattern hold at its first place."""
    found = re.search(pattern, output)
    assert found, output
    return [float(value) for value in found.groups()]


def test_fine_tune():
    output = output_of("fine_tune.py", "--steps", "10", "--macs", "0.3")
    before, after = numbers(r"parameters: (\d+) -> (\d+)", output)
    assert after < 0.5 * before
    assert numbers(r"accuracy after pruning: ([\d.]+)", output)[0] > 5 * CHANCE
    assert numbers(r"accuracy after 10 steps: ([\d.]+)", output)[0] > 5 * CHANCE
    assert "pruned by 'stamp' for macs=0.3" in output and "output of the model" in output


def test_budgets():
    output = output_of("budgets.py", "--macs", "0.2", "--macs", "0.5", "--epochs", "1")
    rows = [line.split() for line in output.splitlines()[-3:]]
    assert [row[0] for row in rows] == ["dense", "0.5", "0.2"]
    macs, params, accuracies = ([float(row[column]) for row in rows] for column in (1, 2, 5))
    assert macs[1:] == [pytest.approx(asked * macs[0], rel=0.02) for asked in (0.5, 0.2)]
    assert params == sorted(params, reverse=True) and min(accuracies) > 3 * CHANCE
    assert any(row[-1] == "yes" for row in rows)


def test_early_pruning():
    output = output_of("early_pruning.py", "--epochs", "4", "--cap", "2", "--macs", "0.25")
    epoch, before, after = numbers(r"cut after epoch (\d); parameters: (\d+) -> (\d+)", output)
    assert epoch == 2 and after < 0.5 * before
    assert numbers(r"epoch 4: accuracy ([\d.]+)", output)[0] > 5 * CHANCE


def test_search_widths():
    output = output_of("search_widths.py", "--macs", "0.4", "--fit-epochs", "1", "--epochs", "2", "--generations", "2")
    before, after = numbers(r"parameters: (\d+) -> (\d+)", output)
    assert after < before
    for name in ("searched", "uniform"):
        macs, accuracy = numbers(rf"{name}: widths .*, ([\d.]+) of the MACs, accuracy ([\d.]+)", output)
        assert macs <= 0.4 and accuracy > 3 * CHANCE


def test_save_and_export(tmp_path):
    output = output_of("save_and_export.py", "--out", str(tmp_path), "--onnx")
    before, after = numbers(r"parameters: (\d+) -> (\d+)", output)
    assert after <= 0.31 * before
    assert numbers(r"plan applied to another network: (\d+) parameters", output) == [after]
    assert numbers(r"accuracy: ([\d.]+)", output)[0] > 3 * CHANCE
    for name, most in (("loaded", 0.0), ("exported", 1e-5), ("ONNX", 1e-4)):
        size, error = numbers(rf"{name}: (\d+) bytes, differs by (\S+)", output)
        assert size > 4 * after and error <= most


def test_metapruning_on_imagenet(tmp_path):
    first = subprocess.run([*METAPRUNING, tmp_path], capture_output=True, text=True, timeout=TIMEOUT)
    assert first.returncode == 0, first.stderr
    genome = json.loads((tmp_path / "macs-0.5" / "genome.json").read_text())
    assert len(genome["ids"]) == 13 and genome["macs"] <= 0.5 * 569e6
    last = first.stdout.splitlines()[-1]
    assert last.startswith("accuracy ")
    again = subprocess.run([*METAPRUNING, tmp_path], capture_output=True, text=True, timeout=TIMEOUT)
    assert again.stdout == first.stdout  # all was kept
    refused = subprocess.run([*METAPRUNING[:2]], capture_output=True, text=True, timeout=TIMEOUT)
    assert refused.returncode == 2 and "--fake" in refused.stderr


@pytest.mark.parametrize(
    ("folder", "options"),
    [("macs-0.3", ("--network", "mobilenet_v2", "--macs", "0.3")), ("latency-0.6", ("--latency", "0.6"))],
)
def test_metapruning_on_imagenet_in_processes(tmp_path, folder, options):
    launch([*METAPRUNING, str(tmp_path), *options], 2)
    assert json.loads((tmp_path / folder / "genome.json").read_text())["widths"]
    assert (tmp_path / folder / "retraining.pt").exists()
