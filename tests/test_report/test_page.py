"""The page: whole, self-contained, safe whatever a layer is called, and honest about what was not measured."""

import dataclasses
import re
from html.parser import HTMLParser

import pytest
from reference.reports import REPORT

from stamp_fast import ArgumentError
from stamp_fast.report import GroupVerdict, PruneReport

_EMPTY = {"meta", "br", "rect", "line", "link", "img", "input"}


class Page(HTMLParser):
    """Parses a page; keeps its elements and its text, and fails where one is not closed in its turn."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in _EMPTY, f"<{tag}/> is not empty"
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" not in self._open:
            self.text.append(data)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture
def page(tmp_path):
    def written(report: PruneReport) -> Page:
        report.to_html(tmp_path / "page.html")
        return Page((tmp_path / "page.html").read_text(encoding="utf-8"))

    return written


def of_groups(count: int) -> PruneReport:
    groups = [GroupVerdict(f"blocks.{i}.conv", 64, 32, "pruned", "", [f"blocks.{i}.conv"]) for i in range(count)]
    groups[1] = GroupVerdict("blocks.1.conv", 64, 64, "kept", "kept on request")
    groups.append(GroupVerdict("head", 1000, 1000, "kept", "output of the model"))
    times = {group.name: 1.0 + i % 7 for i, group in enumerate(groups)} | {"(optimizer)": 3.0, "(other)": 2.0}
    return dataclasses.replace(
        REPORT, groups=groups, layer_ms_before=times, layer_ms_after={name: t / 2 for name, t in times.items()}
    )


def test_a_page_says_it_all(page):
    said = page(REPORT).said()
    for part in (
        "Net, pruned by 'taylor'", "8.00 ms instead of 12.0 ms: 1.50x less", "50% of the MACs and 75% of the",
        "break-even after 3.75 epochs of 50 steps", "peak memory of a step (MB)", "forward in eval mode (ms)",
        "epoch of 50 steps (s)", "2.00x less", "layer1.0.a_rather_long_name_of_a_module.conv1", "output of the model",
        "What pruning took: 0.75 s", "trace", "3.0e-07", "pack_weights on cpu", "CPU, 1 thread", "64 examples",
        "between layers, and the loss", "the pruned train step is NOT faster",
    ):  # fmt: skip
        assert part in said, part


@pytest.mark.parametrize("count", [5, 150])
def test_pages_load_nothing(page, tmp_path, count):
    parsed = page(of_groups(count))
    assert not {"script", "link", "img", "iframe", "object", "embed", "base"} & {tag for tag, _ in parsed.elements}
    for tag, attributes in parsed.elements:
        assert not {"src", "href", "srcset", "xlink:href", "background"} & set(attributes), tag
        assert not any(name.startswith("on") for name in attributes), tag
    source = (tmp_path / "page.html").read_text()
    assert "url(" not in source and "@import" not in source and "http" not in source.replace("http-equiv", "")
    assert any(m.get("content", "").startswith("default-src 'none'") for m in parsed.all("meta"))
    assert len(source) < 200_000


def test_charts_have_a_bar_for_each_and_can_be_read(page):
    parsed = page(of_groups(150))
    rects = [a for a in parsed.all("rect") if "y" in a and a["y"].endswith("%")]
    by_class = {kind: [a for a in rects if a["class"] == kind] for kind in ("cut", "stays", "whole")}
    assert [len(found) for found in by_class.values()] == [149, 149, 1], "the output is not drawn"
    assert {a["height"] for a in by_class["stays"]} == {"40.00%"} and {a["height"] for a in by_class["cut"]} == {
        "80.00%"
    }
    lefts = [float(a["x"].rstrip("%")) for a in by_class["stays"]]
    assert lefts == sorted(lefts) and lefts[-1] + float(by_class["stays"][-1]["width"].rstrip("%")) <= 100
    plot = next(a for a in parsed.all("svg") if a.get("class") == "plot")
    assert plot["role"] == "img" and "150 groups" in plot["aria-label"] and "4,832 of 9,600" in plot["aria-label"]
    said = parsed.said()
    assert "3. blocks.2.conv: 64 channels, 32 stay" in said and "group left whole" in said and "removed" in said
    assert "ms of a training step" in said and "groups, as numbered in the table below" in said
    assert "127 faster layers together" in said, "24 of 151 have a bar"


def test_bars_are_as_long_as_the_times(page):
    parsed = page(REPORT)
    bars = [a for a in parsed.all("rect") if a["class"] in ("before", "after") and a.get("height") == "8"]
    assert [a["width"] for a in bars[:4]] == ["90.00%", "55.00%", "10.00%", "7.50%"]
    assert "layer1.0.a_rather_long_name_of_a_module.conv1: 9.00 ms dense, 5.50 ms pruned" in parsed.said()


def test_names_are_not_markup(page):
    evil = "<script>alert('x')</script>\"&<img src=x onerror=y>"
    group = GroupVerdict(evil, 8, 4, "pruned", "", [evil, evil + "2"])
    kept = GroupVerdict("fc", 8, 8, "kept", f"no rule ({evil})")
    report = dataclasses.replace(
        REPORT,
        method=evil,
        model=evil,
        machine=evil,
        budget={evil: 0.5},
        seconds={evil: 1.0},
        notes=[evil],
        backends={evil: evil},
        groups=[group, kept],
        layer_ms_before={evil: 1.0, "(optimizer)": 1.0, "(other)": 1.0},
        layer_ms_after={evil: 1.0, "(optimizer)": 1.0, "(other)": 1.0},
    )
    parsed = page(report)
    assert not parsed.all("script") and not parsed.all("img")
    assert parsed.said().count(evil) >= 14


def test_any_string_can_be_written(page):
    report = dataclasses.replace(REPORT, groups=[GroupVerdict("\ud800é漢", 8, 4, "pruned")])
    assert "é漢" in page(report).said()


def test_what_is_not_faster_says_so_first(page):
    parsed = page(dataclasses.replace(REPORT, train_step_ms_after=13.0))
    said = parsed.said()
    start = said.index("The pruned network is NOT faster to train on this machine")
    assert start < min(said.index(part) for part in ("MACs", "1.08x more", "never paid back"))
    assert any(a.get("class") == "headline bad" for a in parsed.all("section"))
    assert not any(a.get("class") == "headline bad" for a in page(REPORT).all("section"))


def test_what_was_not_measured_says_so(page):
    report = dataclasses.replace(
        REPORT,
        train_step_ms_before=None,
        train_step_ms_after=None,
        peak_memory_before=None,
        peak_memory_after=None,
        forward_ms_before=None,
        forward_ms_after=None,
        layer_ms_before={},
        layer_ms_after={},
        steps_per_epoch=None,
        batch_size=0,
        notes=["the train step was not measured: the model cannot be copied"],
    )
    parsed = page(report)
    said = parsed.said()
    assert said.count("not measured") >= 8 and "Not measured." in said and "the model cannot be copied" in said
    assert any(a.get("class") == "headline bad" for a in parsed.all("section"))
    assert not re.search(r"\bNone\b|\bnan\b", said)


def test_nothing_to_draw(page):
    said = page(dataclasses.replace(REPORT, groups=[], seconds={}, notes=[])).said()
    assert "Every group: 0 pruned, 0 kept" in said


def test_groups_are_in_network_order(page):
    """The groups that cannot be pruned are listed last, wherever they are in the network."""
    groups = [GroupVerdict(name, 8, 4, "pruned") for name in ("a", "c")]
    groups.append(GroupVerdict("b", 8, 8, "kept", "no rule"))
    times = {"a": 1.0, "b": 1.0, "c": 1.0, "(optimizer)": 1.0, "(other)": 1.0}
    said = page(dataclasses.replace(REPORT, groups=groups, layer_ms_before=times, layer_ms_after=times)).said()
    assert "1. a: 8 channels, 4 stay" in said and "2. b: 8 channels, 8 stay" in said and "3. c: 8" in said


def test_a_path_that_cannot_be_written(tmp_path):
    with pytest.raises(ArgumentError, match="to_html: path=.*missing.*No such file or directory"):
        REPORT.to_html(tmp_path / "missing" / "page.html")
    with pytest.raises(ArgumentError, match="to_html: path="):
        REPORT.to_html(tmp_path)
    with pytest.raises(ArgumentError, match="path: expected a str or os.PathLike, got None"):
        REPORT.to_html(None)
