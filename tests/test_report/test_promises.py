"""What a report says of budgets in time and memory: asked, measured, and by how much they differ."""

import dataclasses
import json

import pytest
from reference.reports import REPORT

from stamp_fast.budget import Budget, Promise, promised
from stamp_fast.report import PruneReport
from stamp_fast.report.words import headline

MIB = 2**20
WHY = "when it was chosen it was measured at 0.51 of the dense network's"


def report_of(*promises: Promise) -> PruneReport:
    return dataclasses.replace(REPORT, budget={p.unit: p.asked for p in promises}, promises=list(promises))


@pytest.mark.parametrize(
    "promise, sentence",
    [
        (
            Promise("train_step", 0.5, 829.4, 402.2, -0.03),
            "Kept within 10%: asked 50% of the dense network's training step, measured 48.5% (402 ms instead of "
            "829 ms).",
        ),
        (
            Promise("latency", "250 ms", 500.0, 243.4, -0.0264),
            "Kept within 10%: asked 250 ms for the forward in eval mode, measured 243 ms (the dense network takes "
            "500 ms).",
        ),
        (
            Promise("train_step", 0.5, 16.8, 9.62, 0.1452, WHY),
            "MISSED: asked 50% of the dense network's training step, measured 57.3% (9.62 ms instead of 16.8 ms), "
            "14.5% more than asked. When it was chosen it was measured at 0.51 of the dense network's.",
        ),
        (
            Promise("latency", "1.5 s", 4000.0, 1200.0, -0.2, WHY),
            "MISSED: asked 1.5 s for the forward in eval mode, measured 1.20 s (the dense network takes 4.00 s), 20% "
            "less than asked. When it was chosen it was measured at 0.51 of the dense network's.",
        ),
        (
            Promise("memory", " 80 MiB ", 160.0 * MIB, 79.0 * MIB, -0.0125),
            "Kept within 10%: asked 80 MiB for the peak memory of a step, measured 79.0 MiB (the dense network takes "
            "160 MiB).",
        ),
        (
            Promise("memory", 0.5, 160e6, 120e6, 0.5),
            "MISSED: asked 50% of the dense network's peak memory of a step, measured 75% (120 MB instead of 160 MB), "
            "50% more than asked.",
        ),
    ],
    ids=["fraction kept", "amount kept", "fraction missed", "amount missed", "memory kept", "no reason"],
)
def test_asked_then_measured_then_the_difference(promise, sentence):
    report = report_of(promise)
    assert headline(report)[2:-1] == [sentence]
    assert sentence in " ".join(str(report).split())


def test_every_promise_has_a_sentence():
    kept, missed = Promise("train_step", 0.5, 10.0, 5.0, 0.0), Promise("memory", "1 GB", 4e9, 2e9, 1.0, WHY)
    sentences = headline(report_of(kept, missed))
    assert [s.split()[0].strip(":") for s in sentences[2:-1]] == ["Kept", "MISSED"]
    assert "50% of the training step and 1 GB for the peak memory of a step" in sentences[1]
    assert len(headline(REPORT)) == 3


def test_what_another_ask_holds_below_its_own_is_kept():
    """Several asks hold at once: only one of them can be met exactly."""
    tight, loose = Promise("train_step", 0.5, 10.0, 5.2, 0.04), Promise("memory", 0.8, 4e8, 2e8, -0.375, WHY)
    sentence = headline(report_of(tight, loose))[3]
    assert sentence.startswith("Kept: asked 80% of the dense network's peak memory of a step, measured 50% (200 MB")
    assert sentence.endswith("37.5% less than asked, since all asks hold at once and another one is tighter.")
    by_macs = dataclasses.replace(report_of(loose), budget={"memory": 0.8, "macs": 0.5})  # and half of them is left
    assert headline(by_macs)[2].startswith("Kept: ")
    both = report_of(dataclasses.replace(tight, missed_by=-0.2), loose)
    assert [sentence.split()[0] for sentence in headline(both)[2:-1]] == ["MISSED:", "MISSED:"]


def test_the_limit_is_in_both_directions():
    found = [Promise("latency", 0.5, 100.0, 50 * (1 + off), off).kept for off in (-0.11, -0.1, 0.1, 0.11)]
    assert found == [False, True, True, False]


def test_what_is_promised_is_held_to_what_was_measured():
    asked = Budget(train_step=0.5, memory="100 MB", macs=0.9)
    kept, missed = promised(
        asked, {"train_step": (20.0, 10.5), "memory": (4e8, 2e8)}, lambda unit, asked: f"why {unit} {asked:g}"
    )
    assert (kept.unit, kept.missed_by, kept.why) == ("train_step", pytest.approx(0.05), "")
    assert (missed.unit, missed.missed_by, missed.why) == ("memory", pytest.approx(1.0), "why memory 0.25")


def test_json_round_trip():
    report = report_of(Promise("train_step", 0.5, 10.0, 5.0, 0.0), Promise("memory", "1 GB", 4e9, 2e9, 1.0, WHY))
    read = json.loads(report.to_json())
    assert read["budget"] == {"train_step": 0.5, "memory": "1 GB"}
    assert [Promise(**promise) for promise in read["promises"]] == report.promises
    assert json.loads(REPORT.to_json())["promises"] == []


def test_the_table_says_what_was_asked():
    text = str(report_of(Promise("memory", "1.5 GB", 4e9, 1.5e9, 0.0), Promise("latency", 0.25, 4.0, 1.0, 0.0)))
    assert "pruned by 'taylor' for memory=1.5 GB, latency=0.25" in text
    assert all(line == line.rstrip() and len(line) <= 110 for line in text.splitlines())


def test_the_page_marks_what_was_missed(tmp_path):
    kept, missed = Promise("train_step", 0.5, 10.0, 5.0, 0.0), Promise("memory", "1 GB", 4e9, 2e9, 1.0, WHY + " <b>")
    for promise, marked in ((kept, 0), (missed, 1)):
        report_of(promise).to_html(tmp_path / "page.html")
        page = (tmp_path / "page.html").read_text()
        assert page.count('<p class="missed">MISSED: ') == marked and "<b>" not in page
        assert ("<p>Kept within 10%: " in page) != bool(marked)
