"""The results of a protocol: one table with a row per run and a column per test set; counts of earlier evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from .tables import format_cell, interval_of

_MISSING = "missing"


def protocol_table(protocol: Mapping[str, Any]) -> Table:
    """The table for the terminal, of the part "protocol" of results.json."""
    table = Table()  # a title, or a caption, would be as narrow as the table
    table.add_column("run", overflow="fold")
    for name in protocol_heads(protocol)[1:]:
        table.add_column(name, justify="right")
    for row in protocol_rows(protocol):
        table.add_row(*row)
    return table


def protocol_heads(protocol: Mapping[str, Any]) -> list[str]:
    """The headings of the columns: run, test sets, mean."""
    return ["run", *protocol["test_sets"], "mean"]


def protocol_rows(protocol: Mapping[str, Any]) -> list[list[str]]:
    """The cells of each run; an interval, or what limits a number, is on a second line, to save width."""
    rows = []
    for run, result in protocol["runs"].items():
        mark = "\n(not this protocol)" if result["differences"] else ""
        cells = [
            _MISSING if numbers is None else format_cell(interval_of(numbers, protocol["metric"])).replace(" [", "\n[")
            for numbers in result["test_sets"].values()
        ]
        rows.append([f"{run}{mark}", *cells, mean_cell(result)])
    return rows


def mean_cell(result: Mapping[str, Any]) -> str:
    """The mean of a run; with the number of test sets, unless it is over all of them."""
    mean = format_cell((result["mean"], None, None))
    if result["mean"] is None or result["n_test_sets"] == result["of_test_sets"]:
        return mean
    return f"{mean}\n(incomplete: {result['n_test_sets']} of {result['of_test_sets']})"


def protocol_warnings(protocol: Mapping[str, Any]) -> list[str]:
    """Runs that were trained on something else."""
    return [
        f"WARNING: {run} does not fit this protocol: {'; '.join(result['differences'])}"
        for run, result in protocol["runs"].items()
        if result["differences"]
    ]


def missing_lines(protocol: Mapping[str, Any]) -> list[str]:
    """What is missing, and what to do."""
    return [f"missing: {text}" for text in protocol["missing"].values()]
