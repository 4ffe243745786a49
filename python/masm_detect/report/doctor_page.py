"""The report of `masm doctor` as one HTML page, without scripts, pictures or fonts from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from .doctor import (
    BETWEEN_COLUMNS,
    INVENTORY_COLUMNS,
    between_rows,
    count_of,
    format_auc,
    inventory_rows,
    label_columns,
    label_rows,
)

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .3em .7em; border-bottom: 1px solid #ddd; text-align: left; vertical-align: top; }
th { background: #f4f4f4; } .number { text-align: right; white-space: nowrap; }
.problem { border-left: 5px solid; margin: 1em 0; padding: .2em 1em; background: #fafafa; }
.error { border-color: #c0392b; } .warning { border-color: #e69f00; }
.error b { color: #c0392b; } .warning b { color: #9a6a00; }
.problem ul { margin: .3em 0; font: 13px/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
details { margin: .3em 0; } .small { color: #666; font-size: .9em; } svg { display: block; margin-left: auto; }
"""
#: Cases of a problem that are shown, without a click and with one.
_SHOWN, _LISTED = 5, 200
#: The axis of the drawn AUCs runs from here to 1; width and height of a drawing in pixels.
_LOWEST, _WIDTH, _HEIGHT = 0.4, 96, 12


def doctor_page(report: Mapping[str, Any]) -> str:
    """The page for a report of `doctor.examine.examine`."""
    names = ", ".join(dict.fromkeys(row["dataset"] for row in report["inventory"]))
    found = f"{count_of(report['errors'], 'error')}, {count_of(report['warnings'], 'warning')}"
    spectrum = report["spectrum"]
    parts = [
        f"<h1>Data report: {escape(names)}</h1>",
        f'<p class="small">{escape(", ".join(report["paths"]))}<br>{escape(report["provenance"]["time_utc"])}</p>',
        f"<h2>Findings: {found}</h2>",
        *(_problem(problem) for problem in report["problems"]),
        *(f'<p class="small">Note: {escape(note)}</p>' for note in report["notes"]),
        "<h2>What is there</h2>",
        _table(INVENTORY_COLUMNS, inventory_rows(report)),
        '<p class="small">kB: median file size. JPEG quality: estimated from the quantization tables; median (lowest '
        "to highest). Groups: a video, or a picture and its forgeries. Damaged files are not counted.</p>",
    ]
    if rows := label_rows(report):
        parts += [
            "<h2>What tells fakes from reals, without a look at the faces</h2>",
            "<p>AUC of a classifier that knows one property only, on groups that it was not fitted on. 0.5 (dotted "
            "line): the property tells nothing; 1: it tells everything. Lines: 95% intervals over groups.</p>",
            _table(label_columns(report), rows),
        ]
    if rows := between_rows(report):
        parts += [
            "<h2>Real images of two data sets, told apart by their spectrum</h2>",
            "<p>Above 0.6, the sets differ in camera, resizing or compression. A detector with reals of one set and "
            "fakes of the other may learn this difference.</p>",
            _table(BETWEEN_COLUMNS, rows),
        ]
    parts.append(
        f'<p class="small">Spectrum: logistic regression on the radial power spectrum of at most {spectrum["limit"]} '
        f"images of each data set and method, resized to {spectrum['side']} x {spectrum['side']} pixels and "
        f"recompressed as JPEG of quality {spectrum['quality']} first; seed {spectrum['seed']}.</p>"
    )
    title = f"<title>Data report: {escape(names)}</title>"
    head = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        title,
        f"<style>{_STYLE}</style>",
    ]
    return "\n".join([*head, "</head>", "<body>", *parts, "</body>", "</html>", ""])


def _problem(problem: Mapping[str, Any]) -> str:
    lines = [f"<li>{escape(line)}</li>" for line in problem["lines"]]
    shown, hidden = lines[:_SHOWN], lines[_SHOWN:_LISTED]
    parts = [f"<p><b>{problem['level']}</b> ({escape(problem['kind'])}): {escape(problem['message'])}</p>"]
    if shown:
        parts.append(f"<ul>{''.join(shown)}</ul>")
    if hidden:
        parts.append(f"<details><summary>{len(hidden)} more</summary><ul>{''.join(hidden)}</ul></details>")
    if len(lines) > _LISTED:
        parts.append(f'<p class="small">report.json lists all {len(lines)}.</p>')
    return f'<div class="problem {problem["level"]}">{"".join(parts)}</div>'


def _table(columns: tuple[Sequence[str], Sequence[str]], rows: Sequence[Sequence[str | Mapping[str, Any]]]) -> str:
    heads = [f"<th>{escape(name)}</th>" for name in columns[0]]
    heads += [f'<th class="number">{escape(name)}</th>' for name in columns[1]]
    lines = [f"<tr>{''.join(heads)}</tr>"]
    for row in rows:
        cells = [
            f"<td{' class=number' if place >= len(columns[0]) else ''}>{_cell(cell)}</td>"
            for place, cell in enumerate(row)
        ]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _cell(cell: str | Mapping[str, Any]) -> str:
    text = escape(format_auc(cell))
    return text if isinstance(cell, str) or cell["auc"] is None else f"{text}{_drawing(cell)}"


def _drawing(numbers: Mapping[str, Any]) -> str:
    """A dot at the AUC, a line for its interval, and a dotted line at 0.5."""

    def place(value: float) -> float:
        return round(4 + (_WIDTH - 8) * (max(value, _LOWEST) - _LOWEST) / (1 - _LOWEST), 1)

    middle, chance = _HEIGHT / 2, place(0.5)
    low, high = numbers["auc_ci"] or (numbers["auc"], numbers["auc"])
    return (
        f'<svg width="{_WIDTH}" height="{_HEIGHT}" role="img" aria-label="AUC {numbers["auc"]:.3f}">'
        f'<line x1="{chance}" x2="{chance}" y1="0" y2="{_HEIGHT}" stroke="#999" stroke-dasharray="2 2"/>'
        f'<line x1="{place(low)}" x2="{place(high)}" y1="{middle}" y2="{middle}" stroke="#0072b2" stroke-width="2"/>'
        f'<circle cx="{place(numbers["auc"])}" cy="{middle}" r="3.5" fill="#0072b2"/></svg>'
    )
