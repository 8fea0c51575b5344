"""Result files as Markdown tables: `python -m benchmarks.table benchmarks/results/*.json`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from .timing import Ratio, Spread, ratio_of, spread

__all__ = ["digits", "markdown_table", "render", "render_file"]


def render(measured: Iterable[dict[str, Any]]) -> str:
    """Markdown of what the `measure` fixture has kept: per suite a table of times and one of ratios."""
    suites: dict[str, list[dict[str, Any]]] = {}
    for entry in measured:
        suites.setdefault(entry["suite"], []).append(entry)
    return "\n\n".join(_suite(name, entries) for name, entries in suites.items())


def render_file(path: Path) -> str:
    """Markdown of a result file, with the machine it was made on."""
    content = json.loads(path.read_text())
    machine, commit = content["machine_info"], content["commit_info"]
    changed = " with local changes" if commit.get("dirty") else ""
    origin = (
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, "
        f"torch {machine['torch']}, commit {commit['id'][:8]}{changed}, {content['datetime'][:10]}"
    )
    return f"{render(bench['extra_info'] for bench in content['benchmarks'])}\n\n{origin}"


def _suite(name: str, entries: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for entry in entries for column in entry["samples"]))
    rounds = sorted({len(values) for entry in entries for values in entry["samples"].values()})
    title = f"### {name.replace('_', ' ')}: median ms (p20 to p80) of {' or '.join(map(str, rounds))} rounds"
    times = [[entry["case"], *(_milliseconds(entry["samples"].get(c)) for c in columns)] for entry in entries]
    parts = [title, markdown_table(["", *columns], times)]
    ratios = [
        [entry["case"], *_ratio_cells(entry["samples"], Ratio(**r))] for entry in entries for r in entry["ratios"]
    ]
    if ratios:
        parts.append(markdown_table(["", "ratio of times", "value", "p20 to p80", "bar", ""], ratios))
    notes = [f"- {entry['case']}: {entry['note']}" for entry in entries if entry.get("note")]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def _milliseconds(samples: list[float] | None) -> str:
    if not samples:
        return ""
    times = spread(samples)
    return f"{digits(1e3 * times.median)} ({digits(1e3 * times.p20)} to {digits(1e3 * times.p80)})"


def digits(value: float) -> str:
    """Three digits, or all of the whole part."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio_cells(samples: dict[str, list[float]], ratio: Ratio) -> list[str]:
    value: Spread = ratio_of(samples, ratio)
    verdict = ("met" if ratio.met(value.median) else "**missed**") if ratio.bar() else ""
    spread_of_rounds = f"{value.p20:.2f} to {value.p80:.2f}"
    return [f"{ratio.top} / {ratio.bottom}", f"{value.median:.2f}", spread_of_rounds, ratio.bar(), verdict]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are written as `str` does."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main(arguments: list[str]) -> None:
    if not arguments:
        sys.exit("usage: python -m benchmarks.table RESULT.json ...")
    print("\n\n".join(render_file(Path(argument)) for argument in arguments))


if __name__ == "__main__":
    main(sys.argv[1:])
