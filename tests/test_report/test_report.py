"""What a report says, in text and JSON."""

import dataclasses
import json

import pytest
from reference.reports import REPORT

from stamp_fast.report import GroupVerdict, PruneReport
from stamp_fast.report.words import figures


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
            layer_ms_before={},
            layer_ms_after={},
        )
    )
    assert text.count("not measured") >= 6
    assert text.startswith("Training time was not measured")
    assert "smaller network =" not in text and "Times:" not in text


def test_json_round_trip():
    read = json.loads(REPORT.to_json())
    names = [f.name for f in dataclasses.fields(PruneReport)]
    assert list(read)[: len(names)] == names
    assert read["prune_seconds"] == 0.75 and read["epoch_seconds_before"] == pytest.approx(0.6)
    assert read["break_even_steps"] == pytest.approx(187.5) and read["break_even_epochs"] == pytest.approx(3.75)
    assert len(read) == len(names) + 5
    fields = {name: read[name] for name in names}
    fields["groups"] = [GroupVerdict(**group) for group in read["groups"]]
    assert PruneReport(**fields) == REPORT


def test_break_even():
    """0.75 s of pruning, 4 ms saved by a step, 50 steps in an epoch."""
    assert REPORT.prune_seconds == 0.75
    assert REPORT.epoch_seconds_before == pytest.approx(50 * 0.012)
    assert REPORT.epoch_seconds_after == pytest.approx(50 * 0.008)
    assert REPORT.break_even_steps == pytest.approx(0.75 / 0.004)
    assert REPORT.break_even_epochs == pytest.approx(0.75 / (0.6 - 0.4))
    text = unwrapped(str(REPORT))
    assert "Pruning took 0.75 s, paid back in training time after 188 steps: break-even after 3.75 epochs of 50" in text
    assert "epoch of 50 steps (s)" in text and "0.6" in text


@pytest.mark.parametrize("after", [12.0, 13.0])
def test_what_saves_nothing_is_never_paid_back(after):
    report = dataclasses.replace(REPORT, train_step_ms_after=after)
    assert report.break_even_steps is None and report.break_even_epochs is None
    text = unwrapped(str(report))
    assert text.startswith("The pruned network is NOT faster to train on this machine")
    assert "which is never paid back" in text and f"1.0{round(100 * after / 12) - 100}x" in text


def test_a_difference_like_noise_is_said_to_be_one():
    text = unwrapped(str(dataclasses.replace(REPORT, train_step_ms_after=11.8)))
    assert text.startswith("The pruned network is hardly faster") and "noise" in text


def test_a_ratio_of_macs_is_no_speed():
    report = dataclasses.replace(REPORT, train_step_ms_after=13.0, macs_after=100)
    assert "faster" not in unwrapped(str(report)).replace("NOT faster", "")
    assert "are no measure of time" in unwrapped(str(report))


def test_a_loader_without_a_length():
    report = dataclasses.replace(REPORT, steps_per_epoch=None)
    assert report.epoch_seconds_before is None and report.break_even_epochs is None
    assert report.break_even_steps == pytest.approx(187.5)
    text = unwrapped(str(report))
    assert "the loader does not say how many steps an epoch has" in text and "the loader has no length" in text
    assert "188 steps" in text


def test_layers_in_text():
    """The slowest by name, the others as one row, and what is between them."""
    many = {f"layers.{i}": float(i) for i in range(20)} | {"(optimizer)": 2.5, "(other)": 3.5}
    text = str(dataclasses.replace(REPORT, layer_ms_before=many, layer_ms_after={n: t / 2 for n, t in many.items()}))
    assert "layers.19" in text and "layers.12" in text and "layers.11 " not in text
    assert "12 faster layers" in text and "66.0" in text and "33.0" in text
    assert "optimizer" in text and "between layers, and the loss" in text


def test_how_it_was_measured_is_said():
    text = unwrapped(str(REPORT))
    assert "median of 9 steps each, dense and pruned in turns" in text and "64 examples" in text
    assert "CPU, 1 thread" in text and "Loading the data is in none of them" in text
    assert "Times: one step each" in unwrapped(str(dataclasses.replace(REPORT, steps_timed=1)))


@pytest.mark.parametrize(
    "value, shown",
    [(0.0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123"), (12345.6, "12,346")],
)
def test_figures(value, shown):
    assert figures(value) == shown


def unwrapped(text: str) -> str:
    return " ".join(text.split())
