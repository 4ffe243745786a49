"""The figures of `masm robustness`: AUC of each distortion and level as a grid, and as curves with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..distortions.registry import DISTORTIONS
from .plots import new_figure

#: Columns of curves, and the colours of AUC by image and by video.
_COLUMNS = 4
_IMAGE, _VIDEO = "#0072b2", "#d55e00"


def by_distortion(entry: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """The cells of each distortion, mild to strong, from what robustness.json holds of a data set.

    A distortion without an AUC at any level is left out.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    for cell in entry["cells"][1:]:
        found.setdefault(cell["distortion"], []).append(cell)
    return {name: cells for name, cells in found.items() if any(cell["auc"] is not None for cell in cells)}


def is_video_level(entry: Mapping[str, Any]) -> bool:
    """Whether videos have several images, so that AUC by video is another number."""
    return entry["cells"][0]["videos_scored"] < entry["cells"][0]["scored"]


def grid_figure(dataset: str, entry: Mapping[str, Any]) -> Figure:
    """AUC by image: a row for each distortion, its levels from mild to strong, the clean images in the first column."""
    rows, clean = by_distortion(entry), entry["cells"][0]
    width = max(map(len, rows.values()), default=0)
    values = np.full((len(rows) + 1, width + 1), np.nan)  # [distortions, levels]
    values[:, 0] = clean["auc"] if clean["auc"] is not None else np.nan
    figure, ((axes,),) = new_figure(size=(3.2 + 1.35 * (width + 1), 1.7 + 0.48 * (len(rows) + 1)))
    names = ["no distortion"]
    for place, (name, cells) in enumerate(rows.items(), 1):
        names.append(f"{DISTORTIONS[name].title}{_other_n(cells, clean)}")
        own = next((cell["difference"]["clean_auc"] for cell in cells if cell["difference"]), None)
        values[place, 0] = np.nan if own is None else own
        for column, cell in enumerate(cells, 1):
            values[place, column] = np.nan if cell["auc"] is None else cell["auc"]
    image = axes.imshow(values, cmap="viridis", vmin=min(0.5, np.nanmin(values, initial=0.5)), vmax=1, aspect="auto")
    for place, cells in enumerate([[], *rows.values()]):
        _write(axes, values[place, 0], 0, place, "clean")
        for column, cell in enumerate(cells, 1):
            _write(axes, values[place, column], column, place, cell["text"], _remark(cell))
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_xticks(
        range(width + 1), ["clean", *(["mild", *[""] * (width - 2), "strong"] if width > 1 else [""] * width)]
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="AUC by image (0.5: chance)", shrink=0.8)
    axes.set_title(f"{dataset}: AUC by image under distortions, {_count(clean)}", fontsize="medium")
    return figure


def _count(cell: Mapping[str, Any]) -> str:
    return f"n = {cell['n_real']:,} real, {cell['n_fake']:,} fake"


def _other_n(cells: list[Mapping[str, Any]], clean: Mapping[str, Any]) -> str:
    """The number of images of a row, where it is another than without distortion."""
    counts = sorted({cell["scored"] for cell in cells})
    if counts == [clean["scored"]]:
        return ""
    return f"\nn = {counts[0]:,}" + (f" to {counts[-1]:,}" if len(counts) > 1 else "")


def _remark(cell: Mapping[str, Any]) -> str:
    if cell["scored"] and cell["unchanged"] == cell["scored"]:
        return "changes nothing"
    return ""


def _write(axes: Axes, value: float, x: int, y: int, text: str, remark: str = "") -> None:
    shown = "none" if np.isnan(value) else f"{value:.3f}".removeprefix("0")
    color = "black" if np.isnan(value) or value > 0.78 else "white"
    axes.text(x, y - 0.14, shown, ha="center", va="center", fontsize=9, color=color)
    axes.text(x, y + 0.24, remark or text, ha="center", va="center", fontsize=5.8, color=color)


def curves_figure(dataset: str, entry: Mapping[str, Any]) -> Figure:
    """AUC over the levels of each distortion with 95% intervals; without distortion as a line, chance dotted."""
    rows, clean = by_distortion(entry), entry["cells"][0]
    lines = max(1, -(-len(rows) // _COLUMNS))
    columns = max(1, min(_COLUMNS, len(rows)))
    figure, panels = new_figure(lines, columns, (3.1 * columns, 0.6 + 2.5 * lines))
    levels = [("", "image", _IMAGE)] + ([("video_", "video", _VIDEO)] if is_video_level(entry) else [])
    lowest = min([0.45, *_ends(entry)])
    for axes, (name, cells) in zip(panels.flat, rows.items()):
        for shift, (prefix, level, color) in zip((0, 0.12), levels):
            own = next((c[f"{prefix}difference"]["clean_auc"] for c in cells if c[f"{prefix}difference"]), None)
            if own is not None:
                axes.axhline(own, color=color, linewidth=0.9, linestyle="--", alpha=0.7)
            shown = [(x, cell) for x, cell in enumerate(cells) if cell[f"{prefix}auc"] is not None]
            axes.plot([x + shift for x, _ in shown], [c[f"{prefix}auc"] for _, c in shown], "o-", color=color,
                      markersize=4, linewidth=1.1, label=f"by {level}")  # fmt: skip
            for x, cell in shown:
                if cell[f"{prefix}auc_ci"] is not None:
                    axes.plot([x + shift] * 2, cell[f"{prefix}auc_ci"], color=color, linewidth=1.1, alpha=0.7)
        axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
        axes.annotate("chance", (1, 0.5), xycoords=("axes fraction", "data"), xytext=(-3, 2), fontsize=6.5,
                      textcoords="offset points", ha="right", color="grey")  # fmt: skip
        axes.set_xticks(range(len(cells)), [cell["level"] for cell in cells], fontsize="small")
        axes.set(xlim=(-0.5, len(cells) - 0.5), ylim=(lowest - 0.02, 1.02))
        axes.set_title(f"{DISTORTIONS[name].title}{_other_n(cells, clean)}", fontsize="small")
        axes.set_xlabel(_axis(name), fontsize=7)
        axes.grid(axis="y", alpha=0.3)
    for axes in list(panels.flat)[len(rows) :]:
        axes.set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("AUC")
    if len(levels) > 1 and rows:
        panels[0, 0].legend(fontsize="x-small", frameon=False, loc="lower left")
    spans = "lines: 95% intervals" if any(c["auc_ci"] for c in entry["cells"]) else "no intervals: too few groups"
    figure.suptitle(f"{dataset}, {_count(clean)}; dashed: without distortion; {spans}", fontsize="medium")
    return figure


def _axis(name: str) -> str:
    """What the levels of a distortion are: its text without the number, or the levels of DeeperForensics-1.0."""
    one = DISTORTIONS[name]
    texts = [one.text.format(value) for value in one.levels.values()]
    first, last = texts[0], texts[-1]
    return f"{first} to {last}" if first != last else first


def _ends(entry: Mapping[str, Any]) -> list[float]:
    """The lower ends of all intervals, and all values of AUC."""
    values = [cell[name] for cell in entry["cells"] for name in ("auc", "video_auc") if cell[name] is not None]
    spans = [cell[name] for cell in entry["cells"] for name in ("auc_ci", "video_auc_ci") if cell[name]]
    return [*values, *(low for low, _ in spans)]
