"""What a report says, and that its measurements measure."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from stamp_fast.report import GroupVerdict, PruneReport, StepCost, compare_steps

REPORT = PruneReport(
    method="taylor",
    budget={"macs": 0.5, "params": 0.75},
    macs_before=2_000_000,
    macs_after=1_000_000,
    params_before=40_000,
    params_after=10_000,
    train_step_ms_before=12.0,
    train_step_ms_after=8.0,
    peak_memory_before=6_000_000,
    peak_memory_after=3_000_000,
    seconds={"trace": 0.25, "cut": 0.5},
    equality_error=3e-7,
    backends={"pack_weights": "cpu"},
    groups=[
        GroupVerdict("layer1.0.a_rather_long_name_of_a_module.conv1", 64, 20, "pruned"),
        GroupVerdict("fc", 10, 10, "kept", "output of the model"),
    ],
    notes=["the pruned train step is NOT faster"],
)


def test_text():
    text = str(REPORT)
    for part in (
        "taylor", "0.5", "0.75", "2.00x less", "4.00x less", "1.50x less", "2.0", "12.0", "8.0", "6.0", "3.0",
        "layer1.0.a_rather_long_name_of_a_module.conv1", "64", "20", "pruned: 1 group", "kept: 1 group", "fc (10)",
        "output of the model", "macs=0.5, params=0.75",
        "NOT faster", "trace 0.25 s", "cut 0.50 s", "3.0e-07",
    ):  # fmt: skip
        assert part in text, part
    assert "\x1b" not in text, "colour codes in plain text"
    assert max(len(line) for line in text.splitlines()) <= 110


def test_no_section_is_empty():
    pruned, kept = REPORT.groups
    assert "kept" not in str(dataclasses.replace(REPORT, groups=[pruned]))
    assert "together with" not in str(REPORT)
    text = str(dataclasses.replace(REPORT, groups=[kept]))
    assert "pruned:" not in text and "kept: 1 group" in text


def test_reasons_are_said_once():
    def kept(i, reason):
        return GroupVerdict(f"blocks.{i}.conv", 8, 8, "kept", reason)

    same = [kept(i, "its size is fixed (aten.view.default in module 'blocks.0' at net.py:5)") for i in range(12)]
    alike = [kept(20 + i, f"no rule (aten.mv.default in module 'blocks.{20 + i}' at net.py:7)") for i in range(4)]
    other = kept(30, "no rule (aten.mv.default in module 'blocks.30' at net.py:8)")
    text = str(dataclasses.replace(REPORT, groups=[*same, *alike, other]))
    assert text.count("its size is fixed") == 1 and "12 groups: its size" in text and "in module 'blocks.0'" in text
    assert "blocks.2.conv (8)" in text and "blocks.3.conv" not in text and "and 9 more" in text
    assert "4 groups: no rule (aten.mv.default at net.py:7)" in text and text.count("no rule") == 2
    assert all(f"blocks.{i}.conv" in text for i in range(20, 24)), "one name more than the most is shown, not counted"
    assert "no rule (aten.mv.default in module 'blocks.30' at net.py:8)" in text


def test_coupled_layers_are_shortened_in_text_only():
    layers = [f"blocks.{i}.proj" for i in range(25)]
    report = dataclasses.replace(REPORT, groups=[GroupVerdict(layers[0], 64, 20, "pruned", "", layers)])
    assert "blocks.1.proj, blocks.2.proj, blocks.3.proj, and 21 more" in str(report)
    assert json.loads(report.to_json())["groups"][0]["layers"] == layers


def test_source_paths_are_short_in_text_only(monkeypatch, tmp_path):
    site = tmp_path / "lib" / "site-packages"
    monkeypatch.setattr("sys.path", ["", "/", str(tmp_path), str(site)])
    monkeypatch.chdir(tmp_path)
    paths = {site / "vision" / "swin.py": " at vision/swin.py:5", tmp_path / "net.py": " at net.py:5"}
    for path, short in paths.items():
        reason = f"no rule for aten.mv (aten.mv at {path}:5)"
        report = dataclasses.replace(REPORT, groups=[GroupVerdict("c", 8, 8, "kept", reason)])
        assert short in str(report) and str(tmp_path) not in str(report)
        assert json.loads(report.to_json())["groups"][0]["reason"] == reason
    report = dataclasses.replace(
        REPORT, groups=[GroupVerdict("c", 8, 8, "kept", "no rule (op at /elsewhere/net.py:5)")]
    )
    assert "/elsewhere/net.py:5" in str(report)


def test_text_of_brackets_is_not_markup():
    group = GroupVerdict("blocks[0].conv", 8, 8, "kept", "no rule for [bold]aten.sort[/bold]; keep=['blocks']")
    text = str(dataclasses.replace(REPORT, groups=[group], notes=["see keep=['conv1']"]))
    assert "blocks[0].conv" in text and "[bold]" in text and "['conv1']" in text


def test_text_without_measurements():
    text = str(
        dataclasses.replace(
            REPORT,
            train_step_ms_before=None,
            train_step_ms_after=None,
            peak_memory_before=None,
            equality_error=None,
        )
    )
    assert text.count("not measured") >= 4
    assert "smaller network =" not in text


def test_json_round_trip():
    read = json.loads(REPORT.to_json())
    assert list(read) == [f.name for f in dataclasses.fields(PruneReport)]
    read["groups"] = [GroupVerdict(**group) for group in read["groups"]]
    assert PruneReport(**read) == REPORT


def loss(model, batch):
    return F.mse_loss(model(batch[0]), batch[1])


def test_steps_are_measured_in_turns():
    torch.set_num_threads(1)
    small, large = nn.Linear(256, 256), nn.Sequential(*[nn.Linear(256, 256) for _ in range(12)])
    batch = torch.randn(256, 256), torch.randn(256, 256)
    costs = compare_steps([large, small], batch, loss)
    assert [type(c) for c in costs] == [StepCost, StepCost]
    assert costs[0].milliseconds > 2 * costs[1].milliseconds > 0
    assert costs[0].peak_bytes > 4 * costs[1].peak_bytes


def test_peak_memory_of_a_known_step():
    """Gradient and momentum, and little else; nothing that was there before."""
    torch.set_num_threads(1)
    model = nn.Linear(1000, 1000, bias=False)
    batch = torch.randn(1, 1000), torch.randn(1, 1000)
    peak = compare_steps([model], batch, loss)[0].peak_bytes
    weight = 4 * 1000 * 1000
    assert 2 * weight <= peak <= 3.1 * weight, "a gradient and a momentum buffer at least"


def test_a_short_time_still_gives_a_measurement():
    cost = compare_steps([nn.Linear(4, 4)], (torch.randn(2, 4), torch.randn(2, 4)), loss, seconds=0.0)[0]
    assert cost.milliseconds > 0


def test_frozen_models_are_measured():
    model = nn.Linear(4, 4).requires_grad_(False)
    cost = compare_steps([model], (torch.randn(2, 4), torch.randn(2, 4)), loss)[0]
    assert cost.milliseconds > 0


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad])
def test_steps_train_whatever_the_context(context):
    model = nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with context():
        compare_steps([model], (torch.randn(2, 4), torch.randn(2, 4)), loss)
    assert bool(model.weight.grad.any())
    assert torch.equal(model.weight, before), "a loss of any scale has to stay finite"
