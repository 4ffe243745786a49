"""Results as rich tables for the terminal, and as cells for the plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

Cell = tuple[float | None, float | None, float | None]


def auc_cells(result: Mapping[str, Any]) -> dict[str, Cell]:
    """(AUC, low, high) by data set and by forgery method of one `metrics.evaluate_scores` result; video AUC where
    there is one.
    """
    cells: dict[str, Cell] = {}
    for dataset, entry in result["datasets"].items():
        prefix = f"{dataset}: " if len(result["datasets"]) > 1 else ""
        for method, numbers in entry["methods"].items():
            cells[f"{prefix}{method}"] = interval_of(numbers, "auc")
        if len(entry["methods"]) > 1:
            cells[f"{prefix}all"] = interval_of(entry["all"], "auc")
    return cells


def interval_of(numbers: Mapping[str, Any], name: str) -> Cell:
    """(value, low, high) of a metric; low and high are None where there is no interval (too few groups)."""
    low, high = numbers.get(f"{name}_ci") or (None, None)
    return numbers.get(name), low, high


def format_cell(cell: Cell) -> str:
    """`.812 [.75, .87]`, or a dash for a value that these samples do not define."""
    value, low, high = cell
    if value is None:
        return "-"
    text = _short(value)
    return text if low is None or high is None else f"{text} [{_short(low)}, {_short(high)}]"


def results_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row a run, data set and forgery method: counts and every metric."""
    table = Table(title="P(fake) against the label; 95% intervals by bootstrap over groups", title_justify="left")
    for name in ("run", "data set", "forgery"):
        table.add_column(name, overflow="fold")
    for name in ("real", "fake", "AUC", "AP", "EER", "acc", "TPR@1%", "video AUC"):
        table.add_column(name, justify="right")
    warnings = []
    for run, result in runs.items():
        seen = result.get("seen_in_training") or {}
        if seen.get("groups"):
            warnings.append(
                f"WARNING: {run} was trained on {seen['groups']} of these {seen['of_groups']} groups "
                f"({seen['samples']} of {seen['of_samples']} images): its numbers are not those of unseen data"
            )
        for dataset, entry in result["datasets"].items():
            # A data set without fakes has no method of its own to list.
            rows = {**entry["methods"], **({"all": entry["all"]} if len(entry["methods"]) != 1 else {})}
            for method, numbers in rows.items():
                table.add_row(
                    run,
                    dataset,
                    method,
                    str(numbers["n_real"]),
                    str(numbers["n_fake"]),
                    format_cell(interval_of(numbers, "auc")),
                    *(format_cell((numbers.get(key), None, None)) for key in ("ap", "eer", "accuracy", "tpr_at_1fpr")),
                    format_cell(interval_of(numbers, "video_auc")),
                )
        table.add_section()
    if warnings:
        table.caption, table.caption_justify, table.caption_style = "\n".join(warnings), "left", "bold red"
    return table


def speed_line(metrics: Mapping[str, Any]) -> str:
    """How fast a training run was, and what it waited for, in words: of what `train` writes to metrics.json."""
    parts = [f"{metrics['images_per_second']:.1f} images/s"]
    if metrics["seconds"]:
        parts.append(f"{metrics['waited'] / metrics['seconds']:.0%} of the time spent waiting for data")
    if metrics["peak_memory_bytes"] is not None:
        parts.append(f"peak memory {metrics['peak_memory_bytes'] / 2**30:.1f} GiB")
    if metrics["gpu_busy"] is not None:
        parts.append(f"GPU busy {metrics['gpu_busy']:.0%} of the time")
    return "training: " + ", ".join(parts)


def mapping_table(title: str, content: Mapping[str, Any]) -> Table:
    """Two columns, name and value; nested mappings become dotted names."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flat(content):
        table.add_row(name, value)
    return table


def show(table: Table) -> None:
    """Print a table to standard output, wide enough for its columns when the output is not a terminal."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) or "-"))
        else:
            rows.append((f"{prefix}{name}", "-" if value is None else str(value)))
    return rows


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
