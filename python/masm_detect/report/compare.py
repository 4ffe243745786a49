"""The report of `masm compare`: tables for the terminal, a forest plot, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.table import Table

from .page import figure_svg, render
from .plots import new_figure

_CLAIM, _NONE = "tab:blue", "dimgrey"
_HOW = {
    "jackknife": "jackknife over groups",
    "delong": "DeLong's variance for clustered samples",
    "bootstrap": "clustered bootstrap",
}


def comparison_tables(content: Mapping[str, Any]) -> list[Table]:
    """The comparisons with verdicts, and, of videos of several images, the same by image for information.

    content: the result of `evaluation.comparison.compare`.
    """
    tables = []
    for level, rows in _levels(content):
        judged = level == content["level"]
        title = f"AUC by {level}, a minus b; {_HOW[content['settings']['variance']]}"
        table = Table(title=title if judged else f"{title} (for information, without a verdict)", title_justify="left")
        texts, numbers = _heads(judged)
        for name in texts:
            table.add_column(name, overflow="fold")
        for name in numbers:
            table.add_column(name, justify="right")
        for row in rows:
            table.add_row(*comparison_row(content, row, judged))
        tables.append(table)
    return tables


def comparison_row(content: Mapping[str, Any], row: Mapping[str, Any], judged: bool) -> list[str]:
    """The cells of a comparison."""
    cells = [
        f"{row['a']} - {row['b']}",
        row["dataset"],
        *([row["verdict"]] if judged else []),
        f"{row['n_real'] + row['n_fake']:,}",
        f"{row['n_real_groups']:,} / {row['n_fake_groups']:,}",
        _auc(content, row, "a"),
        _auc(content, row, "b"),
        f"{row['difference']:+.3f}{_span(row['interval'])}",
        _p(row["p"]),
    ]
    return [*cells, _p(row["p_holm"])] if judged else cells


def _heads(judged: bool) -> tuple[list[str], list[str]]:
    """Columns of text, and columns of numbers."""
    texts = ["comparison", "data set", *(["verdict"] if judged else [])]
    numbers = ["n", "groups\nreal / fake", "AUC a", "AUC b", "difference [95%]", "p", *(["p (Holm)"] if judged else [])]
    return texts, numbers


def forest_figure(content: Mapping[str, Any]) -> Figure:
    """The differences with verdicts: a dot each, its 95% interval (thick), its interval under Holm (thin), and 0."""
    rows = [row for row in content["comparisons"] if row["level"] == content["level"]]
    figure, ((axes,),) = new_figure(size=(9, 1.5 + 0.52 * len(rows)))
    for place, row in enumerate(rows):
        color = _CLAIM if str(row["verdict"]).endswith(" is better") else _NONE
        if row["interval"] is not None:
            axes.plot(row["interval_holm"], [place, place], color=color, linewidth=1)
            axes.plot(row["interval"], [place, place], color=color, linewidth=3, alpha=0.6)
        if row["per_seed"]:
            axes.plot(row["per_seed"], [place + 0.25] * len(row["per_seed"]), ".", color=color, markersize=4)
        filled = color if row["interval"] is not None else "white"
        axes.plot(row["difference"], place, "o", color=color, markerfacecolor=filled)
        axes.annotate(row["verdict"], (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize="small",
                      color=color)  # fmt: skip
    axes.axvline(0, color="black", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(rows)), [_label(content, row) for row in rows], fontsize="small")
    axes.set(ylim=(len(rows) - 0.4, -0.6), title=f"Difference of AUC by {content['level']}")
    seeds = "; small dots: seeds" if any(row["per_seed"] for row in rows) else ""
    lines = "thick: 95% interval, thin: interval that excludes 0 if Holm's test rejects"
    axes.set_xlabel(f"a minus b; {lines}{seeds}", fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    return figure


def comparison_page(content: Mapping[str, Any]) -> str:
    """The page for a comparison."""
    levels = [
        {
            "name": level,
            "judged": level == content["level"],
            "texts": _heads(level == content["level"])[0],
            "numbers": _heads(level == content["level"])[1],
            "rows": [comparison_row(content, row, level == content["level"]) for row in rows],
        }
        for level, rows in _levels(content)
    ]
    return render(
        "compare.html",
        names=list(content["detectors"]),
        provenance=content["provenance"],
        how=_HOW[content["settings"]["variance"]],
        levels=levels,
        notes=content["notes"],
        figure=figure_svg(forest_figure(content)),
        detectors=content["detectors"],
    )


def _levels(content: Mapping[str, Any]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The comparisons of each level, those with verdicts first."""
    names = sorted({row["level"] for row in content["comparisons"]}, key=lambda name: name != content["level"])
    return [(name, [row for row in content["comparisons"] if row["level"] == name]) for name in names]


def _label(content: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    seeds = f", {row['seeds'][0]} and {row['seeds'][1]} seeds" if max(row["seeds"]) > 1 else ""
    count = f"n = {row['n_real'] + row['n_fake']:,} {content['level']}s{seeds}"
    return f"{row['a']} minus {row['b']}\n{row['dataset']}: {count}"


def _auc(content: Mapping[str, Any], row: Mapping[str, Any], side: str) -> str:
    """The AUC of one side; over several seeds with the standard deviation, where the row is of one data set."""
    about = content["detectors"][row[side]]["auc"][row["level"]].get(row["dataset"], {})
    spread = f" +- {about['sd']:.3f}" if about.get("sd") is not None else ""
    return f"{row[f'auc_{side}']:.3f}{spread}"


def _span(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:+.3f}, {interval[1]:+.3f}]"


def _p(value: float | None) -> str:
    if value is None:
        return "-"
    return "<.001" if value < 0.001 else f"{value:.3f}".removeprefix("0")
