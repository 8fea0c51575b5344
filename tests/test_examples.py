"""The programs in examples/ run to their end."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import TIMEOUT, launch

EXAMPLES = Path(__file__).parent.parent / "examples"
METAPRUNING = [sys.executable, str(EXAMPLES / "metapruning_imagenet.py"), "--fake", "--out"]


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
