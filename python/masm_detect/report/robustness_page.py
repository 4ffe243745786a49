"""The report of `masm robustness`: a table for the terminal, and one HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from ..distortions.registry import DISTORTIONS
from .page import figure_svg, render
from .robustness_figures import curves_figure, grid_figure, is_video_level
from .tables import format_cell, interval_of

_VIDEO_DIFFERENCE = "video - clean"


def robustness_table(dataset: str, entry: Mapping[str, Any]) -> Table:
    """One row for each cell of a data set; the differences by video are on the page only."""
    heads = _heads(entry)
    shown = [place for place, head in enumerate(heads) if head != _VIDEO_DIFFERENCE]
    table = Table(title=f"{dataset}: {mean_line(entry)}", title_justify="left")
    for place in shown:
        table.add_column(heads[place], justify="left" if place < 2 else "right")
    rows = _once([_row(cell, entry, is_video_level(entry)) for cell in entry["cells"]])
    following = [cell["suite"] for cell in entry["cells"][1:]]
    for cell, row, after in zip(entry["cells"], rows, [*following, None]):
        table.add_row(*(row[place] for place in shown), end_section=cell["suite"] != after)
    if lines := notes(entry):
        table.caption, table.caption_justify = "\n".join(lines), "left"
    return table


def robustness_page(content: Mapping[str, Any]) -> str:
    """The page for robustness.json."""
    parts = [
        {
            "dataset": dataset,
            "summary": mean_line(entry),
            "grid": figure_svg(grid_figure(dataset, entry)),
            "curves": figure_svg(curves_figure(dataset, entry)),
            "heads": _heads(entry),
            "rows": _once([_row(cell, entry, is_video_level(entry)) for cell in entry["cells"]]),
            "notes": notes(entry),
            "flips": _flip_rows(entry),
            "methods": _method_table(entry),
        }
        for dataset, entry in content["datasets"].items()
    ]
    used = {cell["distortion"] for entry in content["datasets"].values() for cell in entry["cells"][1:]}
    return render(
        "robustness.html",
        run=content["run"],
        provenance=content["provenance"],
        settings=content["settings"],
        parts=parts,
        distortions=[
            {"name": one.name, "title": one.title, "what": _about(one.apply.__doc__), "suite": one.suite}
            for one in DISTORTIONS.values()
            if one.name in used
        ],
    )


def _once(rows: list[list[str]]) -> list[list[str]]:
    """Rows in which a name that stands in the row above is left out."""
    above = [None, *(row[0] for row in rows)]
    return [["" if row[0] == before else row[0], *row[1:]] for row, before in zip(rows, above)]


def mean_line(entry: Mapping[str, Any]) -> str:
    """The clean AUC, the means, the worst cell and the coverage, in one line."""
    overall, clean = entry["overall"], entry["cells"][0]
    parts = [f"clean AUC {format_cell(interval_of(clean, 'auc'))}"]
    for name, title in (("all", "mean"), ("deeperforensics", "DeeperForensics mean")):
        mean = overall[name]
        if mean is not None and (name == "all" or mean["cells"] < overall["all"]["cells"]):
            parts.append(
                f"{title} {format_cell((mean['auc'], None, None))} over {mean['cells']} cells "
                f"({_signed(mean['difference'])})"
            )
    if overall["worst"] is not None:
        worst = overall["worst"]
        parts.append(f"worst {worst['cell']} {format_cell(interval_of(worst, 'auc'))}")
    if overall["coverage"] is not None:
        parts.append(
            f"{overall['coverage']:.1%} of the distorted images scored (clean: {overall['clean_coverage']:.1%})"
        )
    return "; ".join(parts)


def notes(entry: Mapping[str, Any]) -> list[str]:
    """What is missing or unusual in the cells of a data set, one sentence each."""
    lines = []
    cells = entry["cells"][1:]
    if same := [cell["cell"] for cell in cells if cell["scored"] and cell["unchanged"] == cell["scored"]]:
        lines.append(f"left out of the means, because they change no pixel of any image: {', '.join(same)}")
    if partly := [c for c in cells if 0 < c["unchanged"] < c["scored"]]:
        names = ", ".join(f"{c['cell']} {c['unchanged']:,} of {c['scored']:,}" for c in partly)
        lines.append(f"images in which not a pixel changes: {names}")
    for name, verb in (("skipped", "not applicable to"), ("lost", "no score for")):
        for reason, where in _by_reason(entry["cells"], name).items():
            lines.append(f"{verb} {where} ({reason})")
    for reason, count in entry["cells"][0]["files_lost"].items():
        lines.append(f"{count:,} files cannot be read: {reason}")
    if none := [cell["cell"] for cell in cells if cell["scored"] and cell["auc"] is None]:
        lines.append(f"no AUC, because only one class is left: {', '.join(none)}")
    overall = entry["overall"]["deeperforensics"]
    if overall is not None and overall["cells"] < overall["of"]:
        lines.append(f"the DeeperForensics mean is over {overall['cells']} of its {overall['of']} cells")
    return lines


def _by_reason(cells: Sequence[Mapping[str, Any]], name: str) -> dict[str, str]:
    """Reason -> the numbers of images, by cell; equal numbers of all cells as one."""
    reasons = dict.fromkeys(reason for cell in cells for reason in cell[name])
    found = {}
    for reason in reasons:
        counts = {cell["cell"]: cell[name][reason] for cell in cells if reason in cell[name]}
        if len(set(counts.values())) == 1:
            where = "every cell" if len(counts) == len(cells) else ", ".join(counts)
            found[reason] = f"{next(iter(counts.values())):,} images in {where}"
        else:
            found[reason] = "images in " + ", ".join(f"{cell} {count:,}" for cell, count in counts.items())
    return found


def _heads(entry: Mapping[str, Any]) -> list[str]:
    by_video = ["video AUC", _VIDEO_DIFFERENCE] if is_video_level(entry) else []
    calibrated = ["cal. acc"] if _has(entry, "video_accuracy_calibrated") else []
    return ["distortion", "level", "n", "scored", "AUC", "AUC - clean", *by_video, "TPR@1%", *calibrated, "flips"]


def _row(cell: Mapping[str, Any], entry: Mapping[str, Any], by_video: bool) -> list[str]:
    clean = cell["distortion"] == "clean"
    flips = None if clean else cell["flips"]["share"]
    row = [
        "clean" if clean else DISTORTIONS[cell["distortion"]].title,
        cell["text"],
        f"{cell['scored']:,}",
        "-" if cell["coverage"] is None else f"{cell['coverage']:.1%}",
        format_cell(interval_of(cell, "auc")),
        "" if clean else _signed(cell["difference"]),
    ]
    if by_video:
        row += [format_cell(interval_of(cell, "video_auc")), "" if clean else _signed(cell["video_difference"])]
    row.append(format_cell((cell["tpr_at_1fpr"], None, None)))
    if _has(entry, "video_accuracy_calibrated"):
        row.append(format_cell((cell["video_accuracy_calibrated"], None, None)))
    return [*row, "" if clean else "-" if flips is None else f"{flips:.1%}"]


def _has(entry: Mapping[str, Any], name: str) -> bool:
    return any(cell.get(name) is not None for cell in entry["cells"])


def _signed(found: Mapping[str, Any] | None) -> str:
    """A difference with its interval; "-" if it is not defined."""
    if found is None:
        return "-"
    span = "" if found["ci"] is None else f" [{found['ci'][0]:+.3f}, {found['ci'][1]:+.3f}]"
    return f"{found['difference']:+.3f}{span}"


def _flip_rows(entry: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The cells in which most verdicts change, with the kinds of changes."""
    cells = [cell for cell in entry["cells"][1:] if cell["flips"]["flipped"]]
    cells.sort(key=lambda cell: -cell["flips"]["share"])
    return [
        {"cell": c["cell"], "share": f"{c['flips']['share']:.1%}", "flipped": c["flips"]["flipped"],
         "videos": c["flips"]["videos"], "kinds": ", ".join(f"{k}: {n}" for k, n in c["flips"]["kinds"].items())}
        for c in cells[:10]
    ]  # fmt: skip


def _method_table(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """AUC of each forgery in each cell; None with one forgery."""
    methods = sorted({method for cell in entry["cells"] for method in cell["methods"]})
    if len(methods) < 2:
        return None
    rows = [
        [cell["cell"], *(format_cell((cell["methods"].get(m, {}).get("auc"), None, None)) for m in methods)]
        for cell in entry["cells"]
    ]
    return {"methods": methods, "rows": rows}


def _about(doc: str | None) -> str:
    """The first paragraph of a docstring as one line, without code marks."""
    return " ".join((doc or "").split("\n\n")[0].split()).replace("`", "")
