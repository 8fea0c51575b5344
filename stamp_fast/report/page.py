"""A report as one HTML page that loads nothing: charts are inline SVG, and there are no scripts."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from .charts import bars, channel_chart, layer_name, time_chart
from .words import (
    MISSED,
    clearly_faster,
    figures,
    headline,
    how_measured,
    in_network_order,
    ledger,
    percent,
    short_paths,
)

if TYPE_CHECKING:
    from .report import GroupVerdict, PruneReport

# The colours differ in lightness as well as in hue, for those who see no hue and for printers (Okabe and Ito's set).
_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #59636e; --line: #d1d9e0; --box: #f6f8fa;
  --before: #e69f00; --after: #0072b2; --whole: #8c959f; --bad: #b3400e; }
@media (prefers-color-scheme: dark) { :root { --page: #14171b; --text: #e6e9ed; --soft: #a3adb8; --line: #3a424b;
  --box: #1e2329; --before: #e69f00; --after: #56b4e9; --whole: #7d8792; --bad: #ff9a6b; } }
@media print { :root { --page: #fff; --text: #000; --soft: #444; --line: #bbb; --box: #fff; --after: #0072b2;
  --whole: #8c959f; --bad: #b3400e; } tr, svg.plot, .headline { break-inside: avoid; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.15rem; font-weight: 600; margin: 0; color: var(--soft); overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .25rem; }
p, li { margin: .5rem 0; max-width: 46rem; overflow-wrap: anywhere; }
.headline { background: var(--box); border-left: .4rem solid var(--after); padding: .6rem 1rem; margin: .75rem 0; }
.headline.bad { border-color: var(--bad); }
.headline p:first-child { font-size: 1.45rem; line-height: 1.3; font-weight: 600; }
.headline.bad p:first-child, .missed { color: var(--bad); }
.soft, caption { color: var(--soft); font-size: .9rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { text-align: left; padding: .3rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-size: .85rem; font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 400; }
.n { text-align: right; white-space: nowrap; }
.ledger { max-width: 46rem; }
.name { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .85rem; overflow-wrap: anywhere; }
.rows th, .rows td { padding: .15rem .5rem; vertical-align: middle; }
.rows .name { width: 36%; }
.rows .n { width: 6.5rem; }
.rows tfoot td { border: 0; }
.groups .wide { width: 8rem; }
.groups .why { width: 30%; }
.why { font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; overflow: visible; }
svg text { fill: var(--soft); font-size: 12px; }
svg line { stroke: var(--line); }
.bars { width: 100%; min-width: 4rem; }
.plot { width: 100%; height: 19rem; padding: 1.8rem 0 3rem 3rem; margin: .5rem 0; }
.before, .cut { fill: var(--before); }
.after, .stays { fill: var(--after); }
.whole { fill: var(--whole); }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; font-size: .9rem; }
.legend span { display: inline-flex; align-items: center; gap: .4rem; }
.key { width: 14px; height: 14px; }
@media screen and (max-width: 40rem) {
  .headline p:first-child { font-size: 1.2rem; }
  .rows tr, .groups tr { display: grid; align-items: center; border-bottom: 1px solid var(--line); padding: .3rem 0; }
  .rows thead th:first-child, .groups thead th:nth-child(n+5) { display: none; }
  .rows th, .rows td, .groups th, .groups td, .groups .why, .groups .wide { border: 0; padding: 0 .25rem; width: auto; }
  .rows tr { grid-template-columns: 1fr 4rem 4rem; }
  .phases tr { grid-template-columns: 1fr 4rem; }
  .rows .name { grid-column: 1 / -1; width: auto; }
  .rows .n { width: auto; }
  .rows thead .n { white-space: normal; }
  .rows tfoot td:empty { display: none; }
  .ledger th, .ledger td { padding: .3rem .25rem; font-size: .9rem; }
  .ledger td:not(:last-child) { white-space: normal; }
  .groups tr { align-items: start; grid-template-columns: 2.2rem 1fr 4.3rem 3rem; }
  .groups .wide { grid-column: 2 / -1; }
  .groups .why { grid-column: 2 / -1; }
  .groups td:empty { display: none; }
}
"""
_MARKED = ' class="missed"'


def page(report: PruneReport) -> str:
    """The whole page. Every string that comes from the model or its user is escaped."""
    title = f"{report.model or 'Network'}, pruned by '{report.method}'"
    sections = [
        _headline(report),
        _ledger(report),
        _times(report),
        _channels(report),
        _notes(report),
        _phases(report),
        _groups(report),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Nothing is loaded or run, whatever a name might smuggle in.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><header><h1>{escape(title)}</h1></header>\n<main>{''.join(sections)}</main></body></html>\n"
    )


def _headline(report: PruneReport) -> str:
    sentences = "".join(
        f"<p{_MARKED if sentence.startswith(MISSED) else ''}>{escape(sentence)}</p>" for sentence in headline(report)
    )
    return f'<section class="headline{"" if clearly_faster(report) else " bad"}">{sentences}</section>\n'


def _ledger(report: PruneReport) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(row.name)}</th>'
        + "".join(f'<td class="n">{escape(cell)}</td>' for cell in (row.before, row.after, row.ratio))
        + "</tr>"
        for row in ledger(report)
    )
    return (
        '<section><h2>What training costs</h2><table class="ledger"><thead><tr><th scope="col"></th>'
        '<th scope="col" class="n">dense</th><th scope="col" class="n">pruned</th><th scope="col" class="n">ratio</th>'
        f"</tr></thead><tbody>{rows}</tbody></table>"
        f'<p class="soft">{escape(how_measured(report))}</p></section>\n'
    )


def _times(report: PruneReport) -> str:
    if report.layer_ms_before:
        content = (
            '<p class="soft">Every layer\'s share of a training step, forward and backward, in network order. Together '
            f"they are the step.</p>{time_chart(report.layer_ms_before, report.layer_ms_after)}"
        )
    else:
        content = "<p>Not measured.</p>"
    return f"<section><h2>Where the time goes</h2>{content}</section>\n"


def _channels(report: PruneReport) -> str:
    chart = channel_chart(in_network_order(report))
    outputs = sum(group.reason.startswith("output of the model") for group in report.groups)
    left_out = f" Outputs of the model are not drawn ({outputs}): they stay as they are." if outputs else ""
    return (
        '<section><h2>Where the channels went</h2><p class="soft">One column for every group of channels, in network '
        f"order; layers that shrink together are one group.{left_out}</p>{chart}</section>\n"
    )


def _notes(report: PruneReport) -> str:
    notes = [short_paths(note) for note in report.notes]
    if report.equality_error is not None:
        notes.append(
            f"The smaller network gave what the masked dense one gives, to {report.equality_error:.1e} (relative)."
        )
    if report.backends:
        ran = ", ".join(f"{name} on {backend}" for name, backend in sorted(report.backends.items()))
        notes.append(f"Operators of ours that ran: {ran}.")
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f"<section><h2>Notes</h2><ul>{items}</ul></section>\n" if items else ""


def _phases(report: PruneReport) -> str:
    most = max(report.seconds.values(), default=0.0)
    rows = "".join(
        f'<tr><th scope="row" class="name">{escape(name)}</th>'
        f'<td class="wide">{bars(f"{name}: {seconds:.2f} s", {"after": seconds / most if most else 0.0})}</td>'
        f'<td class="n">{seconds:.2f}</td></tr>'
        for name, seconds in report.seconds.items()
    )
    return (
        f"<section><h2>What pruning took: {figures(report.prune_seconds)} s</h2>"
        '<table class="rows phases"><thead><tr><th scope="col">phase</th><th scope="col"></th>'
        f'<th scope="col" class="n">seconds</th></tr></thead><tbody>{rows}</tbody></table></section>\n'
    )


def _groups(report: PruneReport) -> str:
    rows = "".join(_group(i, group) for i, group in enumerate(in_network_order(report), 1))
    pruned = sum(group.verdict == "pruned" for group in report.groups)
    return (
        f"<section><h2>Every group: {pruned} pruned, {len(report.groups) - pruned} kept</h2>"
        '<table class="groups"><thead><tr><th scope="col" class="n">#</th><th scope="col">layer</th>'
        '<th scope="col" class="n">channels</th><th scope="col" class="n">left</th><th scope="col"></th>'
        f'<th scope="col">verdict</th></tr></thead><tbody>{rows}</tbody></table></section>\n'
    )


def _group(number: int, group: GroupVerdict) -> str:
    share = group.kept / group.channels if group.channels else 1.0
    kind = "whole" if group.verdict == "kept" else "after"
    others = [layer_name(layer) for layer in group.layers if layer != group.name]
    together = f'<br><span class="soft">with {", ".join(others)}</span>' if others else ""
    why = f"{escape(group.verdict)}: {escape(short_paths(group.reason))}" if group.reason else escape(group.verdict)
    return (
        f'<tr><td class="n">{number}</td><th scope="row" class="name">{layer_name(group.name)}{together}</th>'
        f'<td class="n">{group.channels}</td><td class="n">{group.kept}</td>'
        f'<td class="wide">{bars(f"{percent(share)} of the channels stay", {kind: share})}</td>'
        f'<td class="why">{why}</td></tr>'
    )
