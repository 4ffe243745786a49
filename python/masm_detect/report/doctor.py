"""The report of `masm doctor` on the terminal: tables and lines. `doctor_page` makes the HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .tables import format_cell, interval_of

#: Cases of a problem that are printed; the report files list all.
_EXAMPLES = 3


def doctor_tables(report: Mapping[str, Any]) -> list[Table]:
    """Tables of the contents, of shortcuts to the label, and of differences between the real images of two data sets.

    report: the result of `doctor.examine.examine`.
    """
    tables = [_table("what is there", INVENTORY_COLUMNS, inventory_rows(report))]
    if rows := label_rows(report):
        title = f"AUC of telling fakes from reals, without a look at the faces{_INTERVALS}"
        tables.append(_table(title, label_columns(report), [[format_auc(cell) for cell in row] for row in rows]))
    if rows := between_rows(report):
        title = f"AUC of telling the real images of two data sets apart, by their spectrum{_INTERVALS}"
        tables.append(_table(title, BETWEEN_COLUMNS, [[format_auc(cell) for cell in row] for row in rows]))
    return tables


def doctor_lines(report: Mapping[str, Any]) -> list[str]:
    """The problems with some examples, the notes, and how many errors and warnings there are."""
    lines = []
    for problem in report["problems"]:
        lines.append(f"{problem['level'].upper()} ({problem['kind']}): {problem['message']}")
        shown = problem["lines"][:_EXAMPLES]
        lines += [f"    {line}" for line in shown]
        if (more := problem["count"] - len(shown)) > 0 and shown:
            lines.append(f"    and {more} more")
    lines += [f"note: {note}" for note in report["notes"]]
    return [*lines, f"{count_of(report['errors'], 'error')}, {count_of(report['warnings'], 'warning')}"]


_INTERVALS = " [95% interval over groups]; 0.5: not at all"

INVENTORY_COLUMNS = (
    ("data set", "split", "method"),
    ("images", "videos", "groups", "pixels", "format", "JPEG quality", "kB"),
)


def inventory_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """The cells of `INVENTORY_COLUMNS`."""
    return [
        [
            row["dataset"],
            row["split"] or "-",
            row["method"],
            *(f"{row[name]:,}" for name in ("images", "videos", "groups")),
            _most(row["pixels"]),
            _most(row["formats"]),
            _quality(row["quality"]),
            f"{row['bytes'] / 1000:.0f}",
        ]
        for row in report["inventory"]
    ]


def label_columns(report: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Columns of text and of AUCs of `label_rows`."""
    names = dict.fromkeys(row["property"] for row in report["shortcuts"])
    return ("data set", "method"), ("real", "fake", *names, "spectrum")


def label_rows(report: Mapping[str, Any]) -> list[list[str | Mapping[str, Any]]]:
    """For each data set and method: texts, and results with "auc" and "auc_ci", in the order of `label_columns`."""
    rows: dict[tuple[str, str], list[str | Mapping[str, Any]]] = {}
    for part in report["shortcuts"]:
        n = [f"{count:,}" for count in part["n"]]
        rows.setdefault((part["dataset"], part["method"]), [part["dataset"], part["method"], *n]).append(part)
    for part in report["spectrum"]["real_against_fake"]:
        rows[part["dataset"], part["method"]].append(part)
    return list(rows.values())


BETWEEN_COLUMNS = (("data set", "and"), ("images", "images", "spectrum"))


def between_rows(report: Mapping[str, Any]) -> list[list[str | Mapping[str, Any]]]:
    """For each two data sets: texts, and the result, in the order of `BETWEEN_COLUMNS`."""
    return [[part["a"], part["b"], *map(str, part["n"]), part] for part in report["spectrum"]["between_reals"]]


def format_auc(cell: str | Mapping[str, Any]) -> str:
    """A text as it is, a result as its AUC and interval."""
    return cell if isinstance(cell, str) else format_cell(interval_of(cell, "auc"))


def count_of(number: int, noun: str) -> str:
    """`1 error`, `2 errors`, `no error`."""
    return f"{number or 'no'} {noun}{'s' if number > 1 else ''}"


def _table(title: str, columns: tuple[Sequence[str], Sequence[str]], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns[0]:
        table.add_column(name, overflow="fold")
    for name in columns[1]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _most(counts: Mapping[str, int]) -> str:
    """The most frequent names, and how many others there are."""
    names = list(counts)
    return ", ".join(names[:2]) + (f", {len(names) - 2} more" if len(names) > 2 else "")


def _quality(quality: Sequence[float] | None) -> str:
    if quality is None:
        return "-"
    low, median, high = quality
    return f"{median:.0f}" if low == high else f"{median:.0f} ({low:.0f} to {high:.0f})"
