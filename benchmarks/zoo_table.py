"""The zoo's results as Markdown."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .table import digits, markdown_table

__all__ = ["read", "render"]

Record = dict[str, Any]
_HEADER = """# The zoo

Every network of torchvision, and from every file of timm the smallest of each kind, through one and the same road:
random values in all parameters and buffers, trace, local L2 magnitude, half of the MACs removed, compacted.
Written by `python -m benchmarks.zoo`; the choice of networks is in `benchmarks/zoo_timm.txt`.

- **pass**: 0.5 of the MACs within 2 percent; in float64 the compacted network computes what the dense one does with
  the channels masked, to 1e-9 of the largest output (float32, for over 300 million parameters or where the forward
  itself makes float32 tensors: 1e-4); forward and backward run in train mode. Detectors: images in, boxes out, in
  any order where they are equally sure.
- **partial**: all of this, but for the budget: the MACs column says how far down it goes.
- **FAIL**: anything else; freezing everything is a failure too.
- **groups**: pruned / kept whole (the output's own channels not counted). The reasons are listed at the end.
- **ms**: structural work alone: from a dense float32 network to one with half of every group removed by its local L2
  norm, batch 1; median of 3, after one that warms up. Ours includes the replay of the cut, and the mending of what
  that trips over. Torch-Pruning:
  `MagnitudePruner` as it comes, the layers that make the output ignored; run in turns with ours; once where slow.
  It has a minute for a classifier, half a minute for anything else; while it ran on one core, the other was busy too.
- **Torch-Pruning's verdict**: "runs" = forward and backward run after pruning, and the output keeps its shape. What
  the output is was not compared."""


def read(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The machine, and one record a network."""
    first, *lines = path.read_text().splitlines()
    return json.loads(first)["machine"], [json.loads(line) for line in lines]


def render(machine: dict[str, Any], records: list[Record]) -> str:
    """The page: counts by family, medians and extremes, losses, and a row for every network."""
    parts = [_HEADER, _machine(machine), "## Summary", _summary(records), *_extremes(records)]
    parts += ["## Not passed", _not_passed(records), "## Networks", _networks(records)]
    parts += ["## Why groups are kept whole", _reasons(records)]
    return "\n\n".join(parts) + "\n"


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, "
        f"torch {machine['torch']}, {', '.join(f'{k} {v}' for k, v in machine['packages'].items())}"
    )


def _area(record: Record) -> str:
    return "timm" if record["family"].startswith("timm") else f"torchvision {record['family']}"


def _ms(samples: list[float] | None) -> float | None:
    return 1e3 * statistics.median(samples) if samples else None


def _peer(record: Record) -> str:
    return record.get("peer", {}).get("verdict", "")


def _ratio(record: Record) -> float | None:
    """Torch-Pruning's time over ours, where both have a result that runs."""
    ours, theirs = _ms(record.get("ours")), _ms(record.get("peer", {}).get("seconds"))
    return theirs / ours if ours and theirs and _peer(record) == "runs" else None


def _median(values: Iterable[float | None]) -> str:
    values = [value for value in values if value is not None]
    return digits(statistics.median(values)) if values else ""


def _summary(records: list[Record]) -> str:
    areas = list(dict.fromkeys(map(_area, records)))
    rows = []
    for area in [*areas, "all"]:
        chosen = [r for r in records if area in ("all", _area(r))]
        count = [sum(r["verdict"] == v for r in chosen) for v in ("pass", "partial", "FAIL")]
        tried = [r for r in chosen if _peer(r)]
        runs = sum(_peer(r) == "runs" for r in tried)
        both = [_ratio(r) for r in chosen]
        rows.append(
            [area, len(chosen), *count, f"{runs} of {len(tried)}", _median(_ms(r.get("ours")) for r in chosen)]
            + [_median(both), sum(x is not None and x < 1 for x in both)]
        )
    header = ["", "networks", "pass", "partial", "FAIL", "Torch-Pruning runs", "median ms", "median ratio of times"]
    return markdown_table([*header, "slower than Torch-Pruning"], rows)


def _extremes(records: list[Record]) -> list[str]:
    lines = []
    timed = sorted((_ms(r["ours"]), r["name"]) for r in records if r.get("ours"))
    if timed:
        lines.append(f"- slowest: {', '.join(f'{name} {digits(ms)} ms' for ms, name in timed[:-6:-1])}")
    ratios = sorted((ratio, r["name"]) for r in records if (ratio := _ratio(r)) is not None)
    if ratios:
        lines.append(f"- smallest ratios of times: {', '.join(f'{name} {digits(x)}' for x, name in ratios[:5])}")
        lines.append(f"- largest ratios of times: {', '.join(f'{name} {digits(x)}' for x, name in ratios[:-6:-1])}")
    for dtype in ("float64", "float32"):
        errors = [(r["equality"], r["name"]) for r in records if r.get("dtype") == dtype and "equality" in r]
        finite = [e for e in errors if math.isfinite(e[0])]
        if finite:
            lines.append(f"- largest equality error in {dtype}: {max(finite)[0]:.1e} ({max(finite)[1]})")
    verdicts: dict[str, list[str]] = {}
    for r in records:
        if _peer(r) not in ("", "runs"):
            verdicts.setdefault(_peer(r), []).append(r["name"])
    lines += [f"- Torch-Pruning {verdict}: {len(names)} ({', '.join(names)})" for verdict, names in verdicts.items()]
    return ["\n".join(lines)] if lines else []


def _not_passed(records: list[Record]) -> str:
    rows = [
        [r["family"], r["name"], _bold(r["verdict"]), _cell(r["why"], 300), _peer(r)]
        for r in records
        if r["verdict"] != "pass"
    ]
    return markdown_table(["family", "network", "verdict", "why", "Torch-Pruning"], rows) if rows else "Nothing."


def _networks(records: list[Record]) -> str:
    rows = []
    for r in records:
        groups = f"{r['groups']} / {r['kept']}" if "groups" in r else ""
        reached = f"{r['reached']:.3f}" if "reached" in r else ""
        equality = f"{r['equality']:.0e}{'' if r['dtype'] == 'float64' else ' (f32)'}" if "equality" in r else ""
        ours, theirs, ratio = _ms(r.get("ours")), _ms(r.get("peer", {}).get("seconds")), _ratio(r)
        shape = "x".join(map(str, r.get("shape", [])))
        times = ["" if value is None else digits(value) for value in (ours, theirs, ratio)]
        rows.append([r["family"], r["name"], shape, _bold(r["verdict"]), reached, groups, len(r.get("reasons", []))])
        rows[-1] += [equality, times[0], _peer(r), times[1], times[2]]
    header = ["family", "network", "input", "verdict", "MACs", "groups", "reasons", "error", "ms", "Torch-Pruning"]
    return markdown_table([*header, "its ms", "ratio"], rows)


def _reasons(records: list[Record]) -> str:
    groups: dict[str, int] = {}
    networks: dict[str, list[str]] = {}
    for r in records:
        for reason, count in r.get("reasons", {}).items():
            short = _cell(reason.partition(" (")[0].partition(" at ")[0], 120)
            groups[short] = groups.get(short, 0) + count
            names = networks.setdefault(short, [])
            if r["name"] not in names:
                names.append(r["name"])
    rows = []
    for reason, count in sorted(groups.items(), key=lambda item: -item[1]):
        names = networks[reason]
        rows.append([reason, count, len(names), ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")])
    return markdown_table(["reason", "groups", "networks", ""], rows) if rows else "None is."


def _bold(verdict: str) -> str:
    return verdict if verdict == "pass" else f"**{verdict}**"


def _cell(text: str, most: int) -> str:
    text = text.replace("|", "/").replace("\n", " ")
    return text if len(text) <= most else text[: most - 3] + "..."
