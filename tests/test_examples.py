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


def test_budgets(tmp_path, monkeypatch):
    monkeypatch.setenv("STAMP_FAST_CACHE", "")
    options = ["--macs", "0.5", "--macs", "0.2", "--train-step", "0.7", "--pick", "2", "--epochs", "1"]
    output = output_of("budgets.py", *options, "--out", str(tmp_path))
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    assert [row[1] for row in rows] == ["macs=1", "macs=0.5", "macs=0.2", "train_step=0.7"]
    macs, params, _, scores = ([float(row[column]) for row in rows] for column in (2, 3, 4, 5))
    assert macs[:3] == [1, pytest.approx(0.5, rel=0.02), pytest.approx(0.2, rel=0.02)]
    assert params[0] > params[1] > params[2] and min(scores) > 2 * CHANCE
    assert any(row[-1] == "yes" for row in rows)
    before, after = numbers(r"2 picked; parameters: (\d+) -> (\d+)", output)
    assert after / before == pytest.approx(params[2], abs=0.001), "what was picked is what the table says"
    assert numbers(r"accuracy: [\d.]+ -> ([\d.]+) after 1 epochs", output)[0] > 5 * CHANCE
    assert {path.name for path in tmp_path.iterdir()} == {"sweep.csv", "sweep.png"}


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
