"""Result files as Markdown tables.

    python -m benchmarks.table                             # prints all of benchmarks/results
    python -m benchmarks.table RESULT.json ...             # these
    python -m benchmarks.table --write docs/benchmarks.md  # writes the page

Wins and losses are printed alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from .timing import Ratio, Spread, ratio_of, spread

__all__ = ["digits", "markdown_table", "page", "render", "render_file"]

_RESULTS = Path(__file__).parent / "results"
# What is slower than ours, one hopes.
_PEERS = ("dense", "dense, compiled", "Torch-Pruning", "Torch-Pruning, compiled", "PyTorch")

# By suite: title and what is measured; in the order of the page.
_SUBJECTS = {
    "structural": (
        "Structural time",
        "From a dense network to one with half of the channels of every group, by their L2 norm: trace, score, select, "
        "replay, cut. 224 x 224, batch 1. `settled` looks for sizes that the forward holds as well, as `prune` does. "
        "Torch-Pruning does not check the smaller network; ours is replayed and compared.",
    ),
    "train_step": (
        "Train step",
        "Forward, backward and an SGD step of a CIFAR-shaped ResNet-18. `virtual` is the dense network virtually "
        "compacted (`graph.masked`): it pays for packing its weights in every step, and for an optimizer that goes "
        "over all dense parameters. `compacted` is cut for good. `by hand` was written with the same widths; `by hand, "
        "again` is that network twice, and says how far noise alone goes.",
    ),
    "baselines": (
        "Train step beside the usual ways",
        "The same step beside what one would try first, side by side in one run. `torch.nn.utils.prune` masks the same "
        "channels: filters, and scale and bias of the batch norms after them. `Torch-Pruning` cuts to the same MACs, "
        "with scores of the same kind and widths rounded alike. `compiled` is `torch.compile` (inductor, the whole "
        "network or nothing) of the network alone; compiling counts in the first step, which is not timed with the "
        "others. How many times fewer MACs a network has is printed beside how many times shorter its step is, for "
        "the two are not the same.",
    ),
    "kernels": (
        "Kernels",
        "Operators on tensors that lie in no cache, half of rows and columns kept wherever they lie. `clone` and "
        "`copy_` are torch's copies of as many bytes as are live, into fresh memory and into memory that is there; "
        "`copy_, lines` is the copy of the whole cache lines that hold them, for memory delivers no less.",
    ),
    "phases": (
        "Phases",
        "Where the structural time goes. `settle` is what `prune` adds to a trace; `check` is the replay, which "
        "`compact` does once more before it cuts.",
    ),
}

# Pages of experiments that write their own: file, what it holds, what makes it.
_PAGES = (
    ("time_to_accuracy.md", "Accuracy against seconds, pruned in every way that people know", "bench-time_to_accuracy"),
    ("ablation.md", "What STAMP's parts are worth", "bench-ablation"),
    ("early.md", "Pruning while training, beside pruning at the start and half way", "bench-early"),
    (
        "budget_promises.md",
        "Budgets in time and memory: promised and measured, and accuracy at equal time",
        "bench-budgets",
    ),
    ("metapruning.md", "Searched widths against uniform, random and ranked ones", "bench-metapruning"),
    ("zoo.md", "Every network of torchvision and 244 of timm: right or wrong, and structural time", "zoo"),
)


def render(measured: Iterable[dict[str, Any]]) -> str:
    """Markdown of what the `measure` fixture has kept: per suite a table of times and one of ratios."""
    parts = []
    for name, entries in _by_suite(measured).items():
        parts += [f"### {_title(name)}", _tables(entries), _verdict(entries), _notes(entries)]
    return "\n\n".join(filter(None, parts))


def render_file(path: Path) -> str:
    """Markdown of a result file, with the machine it was made on."""
    content = json.loads(path.read_text())
    return f"{render(_entries(content))}\n\n{_origin(content)}"


def page(paths: Iterable[Path], docs: Path) -> str:
    """docs/benchmarks.md: a section for each subject, and links to the pages that there are in `docs`."""
    found: dict[str, list[str]] = {}
    for path in paths:
        content = json.loads(path.read_text())
        for name, entries in _by_suite(_entries(content)).items():
            parts = [_origin(content), _tables(entries), _verdict(entries), _notes(entries)]
            found.setdefault(name, []).append("\n\n".join(filter(None, parts)))
    parts = [
        "# Benchmarks",
        "Written by `python -m benchmarks.table --write docs/benchmarks.md` from the samples in `benchmarks/results`. "
        "Contestants take turns in one run; times are medians in milliseconds, with the 20th and 80th percentile. "
        "Milliseconds are the machine's: compare ratios. All ratios are of times, those of MACs are called so. A bar "
        "that was missed is printed like one that was met.",
        markdown_table(
            ["subject", "one command"],
            [
                *([f"[{_title(name)}](#{_anchor(_title(name))})", f"`make bench-{name}`"] for name in _ordered(found)),
                *(
                    [f"[{what}]({file})" if (docs / file).exists() else f"{what} (no page yet)", f"`make {target}`"]
                    for file, what, target in _PAGES
                ),
                ["the timed suites, and this page", "`make bench`"],
                ["all of it: many hours", "`make bench-all`"],
            ],
        ),
        '`ARGS` is passed on, as in `make bench-train_step ARGS="--rounds 2"` for a quick look.',
    ]
    for name in _ordered(found):
        parts += [f"## {_title(name)}", *([_SUBJECTS[name][1]] if name in _SUBJECTS else []), *found[name]]
    return "\n\n".join(parts) + "\n"


def _entries(content: dict[str, Any]) -> list[dict[str, Any]]:
    return [bench["extra_info"] for bench in content["benchmarks"]]


def _by_suite(measured: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    suites: dict[str, list[dict[str, Any]]] = {}
    for entry in measured:
        suites.setdefault(entry["suite"], []).append(entry)
    return suites


def _ordered(names: Iterable[str]) -> list[str]:
    known = list(_SUBJECTS)
    return sorted(names, key=lambda name: known.index(name) if name in known else len(known))


def _title(suite: str) -> str:
    return _SUBJECTS[suite][0] if suite in _SUBJECTS else suite.replace("_", " ").capitalize()


def _anchor(title: str) -> str:
    return title.lower().replace(" ", "-")


def _origin(content: dict[str, Any]) -> str:
    machine, commit = content["machine_info"], content["commit_info"]
    changed = " with local changes" if commit.get("dirty") else ""
    return (
        f"{machine['cpu']} ({machine['capability']}), {machine['threads']} of {machine['cores']} cores, "
        f"torch {machine['torch']}, commit {commit['id'][:8]}{changed}, {content['datetime'][:10]}."
    )


def _tables(entries: list[dict[str, Any]]) -> str:
    """Times and ratios, a row for each case; entries that name what all is held `against` get a table of their own, a
    row for each contestant, and here only the ratios that are left.
    """
    parts = [_by_contestant(entry) for entry in entries if entry.get("against")]
    in_rows = [entry for entry in entries if not entry.get("against")]
    if in_rows:
        parts.append(_times(in_rows))
    left = {entry["case"]: [r for r in _ratios(entry) if r.top not in entry.get("against", ())] for entry in entries}
    named = list(dict.fromkeys(_name(ratio) for ratios in left.values() for ratio in ratios))
    if named:
        rows = []
        for entry in entries:
            cells = {_name(ratio): _ratio_cell(entry["samples"], ratio) for ratio in left[entry["case"]]}
            rows.append([entry["case"], *(cells.get(name, "") for name in named)])
        parts.append(markdown_table(["ratio of times", *named], rows))
    return "\n\n".join(parts)


def _by_contestant(entry: dict[str, Any]) -> str:
    """Contestants as rows, under the case's name: times, ratios of times, and the columns that the entry brings."""
    cells = {(ratio.top, ratio.bottom): _ratio_cell(entry["samples"], ratio) for ratio in _ratios(entry)}
    columns = entry.get("columns", {})
    rows = [
        [
            name,
            _milliseconds(samples),
            *(cells.get((top, name), "") for top in entry["against"]),
            *(digits(values[name]) if name in values else "" for values in columns.values()),
        ]
        for name, samples in entry["samples"].items()
    ]
    rounds = max(map(len, entry["samples"].values()))
    header = [f"median ms of {rounds} rounds", *(f"times, {top} / this" for top in entry["against"]), *columns]
    return f"**{entry['case']}**\n\n{markdown_table(['', *header], rows)}"


def _times(entries: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for entry in entries for column in entry["samples"]))
    rounds = sorted({len(values) for entry in entries for values in entry["samples"].values()})
    times = [[entry["case"], *(_milliseconds(entry["samples"].get(c)) for c in columns)] for entry in entries]
    return markdown_table([f"median ms of {' or '.join(map(str, rounds))} rounds", *columns], times)


def _notes(entries: list[dict[str, Any]]) -> str:
    notes = [f"- {entry['case']}: {entry['note']}" for entry in entries if entry.get("note")]
    return "\n".join(["The cases:", "", *notes]) if notes else ""


def _verdict(entries: list[dict[str, Any]]) -> str:
    """Which bars are met and which are not, the worst of each; and where a peer is not the slower one."""
    lines = []
    values: dict[tuple[str, str], list[tuple[float, bool, str]]] = {}
    for entry in entries:
        for ratio in _ratios(entry):
            value, name = ratio_of(entry["samples"], ratio).median, _name(ratio)
            if ratio.bar():
                values.setdefault((name, ratio.bar()), []).append((value, ratio.met(value), entry["case"]))
            if ratio.top in _PEERS and round(value, 2) <= 1:
                lines.append(f"- **not faster**: {name} is {value:.2f} for {entry['case']}")
    for (name, bar), found in values.items():
        missed = [value for value in found if not value[1]]
        if missed:
            worst, _, case = (min if bar.startswith(">") else max)(missed)
            lines.append(
                f"- **missed** {len(missed)} of {len(found)} times: {name} {bar}; worst: {worst:.2f}, for {case}"
            )
        else:
            lines.append(f"- met {len(found)} of {len(found)} times: {name} {bar}")
    return "\n".join(lines)


def _milliseconds(samples: list[float] | None) -> str:
    if not samples:
        return ""
    times = spread(samples)
    return f"{digits(1e3 * times.median)} ({digits(1e3 * times.p20)} to {digits(1e3 * times.p80)})"


def digits(value: float) -> str:
    """Three digits, or all of the whole part."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratios(entry: dict[str, Any]) -> list[Ratio]:
    return [Ratio(**ratio) for ratio in entry["ratios"]]


def _name(ratio: Ratio) -> str:
    return f"{ratio.top} / {ratio.bottom}"


def _ratio_cell(samples: dict[str, list[float]], ratio: Ratio) -> str:
    value: Spread = ratio_of(samples, ratio)
    cell = f"{value.median:.2f} ({value.p20:.2f} to {value.p80:.2f})"
    if not ratio.bar():
        return cell
    return f"{cell}, {ratio.bar()} {'met' if ratio.met(value.median) else '**missed**'}"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; cells are written as `str` does."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _is_suite(path: Path) -> bool:
    """Whether the `measure` fixture made it: other experiments keep JSON beside."""
    content = json.loads(path.read_text())
    return isinstance(content, dict) and {"machine_info", "commit_info", "benchmarks"} <= content.keys()


@click.command()
@click.argument("results", nargs=-1, type=click.Path(path_type=Path, exists=True, dir_okay=False))
@click.option("--write", type=click.Path(path_type=Path, dir_okay=False), help="The page, in the place of printing.")
def main(results: tuple[Path, ...], write: Path | None) -> None:
    """Print what the result files hold, or write the page; without files, of all in benchmarks/results."""
    paths = sorted(results or _RESULTS.glob("*.json"))
    suites = [path for path in paths if _is_suite(path)]
    for path in set(results) - set(suites):
        click.echo(f"{path}: not of a timed suite, left out", err=True)
    if write is None:
        click.echo("\n\n".join(map(render_file, suites)))
    else:
        write.write_text(page(suites, write.parent))


if __name__ == "__main__":
    main()
