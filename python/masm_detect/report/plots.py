"""Figures, each a function from plain numbers to one PNG file. No display is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.text import Text

from masm_ext.files import write_atomically

from .tables import Cell, auc_cells, auc_counts


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches and its axes [rows, columns]."""
    # Without pyplot, which keeps global state and may look for a display.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def without_tex(figure: Figure) -> None:
    """Take every text of a figure as it is: a name may hold dollar signs, between which matplotlib reads TeX."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)


def save_figure(figure: Figure, path: Path | str, dpi: int = 120) -> Path:
    """Write a figure as PNG, making the folder if needed; a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    without_tex(figure)
    image = io.BytesIO()
    # Without the software field the bytes depend on the numbers and the library only.
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    write_atomically(path, image.getvalue())
    return path


def plot_history(history: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """`history_figure` as PNG."""
    return save_figure(history_figure(history), path)


def history_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses and source-validation AUC by epoch, from the entries of `history.jsonl`."""
    figure, ((losses, auc),) = new_figure(1, 2, (9, 3.5))
    epochs = [entry["epoch"] for entry in history]
    losses.plot(epochs, [entry["train_loss"] for entry in history], marker="o", label="train")
    losses.plot(epochs, [entry["val_loss"] for entry in history], marker="o", label="source validation")
    if any(entry["penalty"] for entry in history):
        losses.plot(epochs, [entry["penalty"] for entry in history], marker="o", label="penalty (train)")
    losses.set(xlabel="epoch", ylabel="loss")
    losses.legend()
    auc.plot(epochs, [entry["val_auc"] for entry in history], marker="o", color="tab:green")
    auc.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    auc.set(xlabel="epoch", ylabel="source validation AUC")
    for axes in (losses, auc):
        axes.set_xticks(epochs)
    return figure


def plot_drift(history: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """||dW||_F / ||W||_F of each adapted layer after each epoch, as a heatmap (layers by epochs)."""
    layers = list(history[-1]["drift"])
    values = np.array([[entry["drift"][layer] for entry in history] for layer in layers])  # [L, epochs]
    figure, ((axes,),) = new_figure(size=(4 + 0.4 * len(history), 2 + 0.13 * len(layers)))
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="||dW|| / ||W||")
    axes.set(xlabel="epoch", xticks=range(len(history)), xticklabels=[entry["epoch"] for entry in history])
    label_layers(axes, layers)
    return save_figure(figure, path)


def plot_masks(mask_history: Sequence[Mapping[str, Any]], layers: Sequence[str], path: Path | str) -> Path:
    """`masks_figure` as PNG."""
    return save_figure(masks_figure(mask_history, layers), path)


def masks_figure(mask_history: Sequence[Mapping[str, Any]], layers: Sequence[str]) -> Figure:
    """Evolution of the layer masks, one panel a subspace: layers by mask updates, green where a block learns."""
    masks = np.array([entry["mask"] for entry in mask_history], dtype=float)  # [updates, L, K]
    steps = [entry["step"] for entry in mask_history]
    subspaces = masks.shape[2]
    figure, (panels,) = new_figure(1, subspaces, (2.5 + 2.6 * subspaces, 2.3 + 0.13 * len(layers)))
    colors = colormaps["Greens"]
    for k, axes in enumerate(panels):
        axes.imshow(masks[:, :, k].T, aspect="auto", cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        ticks = np.unique(np.linspace(0, len(steps) - 1, min(5, len(steps))).round().astype(int))
        axes.set(
            title=f"subspace {k + 1}",
            xlabel="step",
            xticks=ticks,
            xticklabels=[steps[tick] for tick in ticks],
        )
        if k == 0:
            label_layers(axes, layers)
        else:
            axes.set_yticks([])
    states = (("active (learns)", 1.0), ("masked", 0.0))
    patches = [Patch(facecolor=colors(value), edgecolor="grey", label=label) for label, value in states]
    figure.legend(handles=patches, loc="outside upper right", ncols=2, fontsize="small", frameon=False)
    return figure


#: Colour of each method, the same in every figure; other series take the remaining colours in turn.
METHOD_COLORS = {
    "probe": "tab:gray",
    "full": "tab:brown",
    "ln": "tab:pink",
    "bitfit": "tab:red",
    "lora": "tab:blue",
    "milora": "navy",
    "osf": "tab:cyan",
    "effort": "tab:orange",
    "masm-nomask": "tab:olive",
    "masm": "tab:green",
}
_OTHER_COLORS = (
    "tab:purple",
    "black",
    "goldenrod",
    "teal",
    "maroon",
    "orchid",
    "darkgreen",
)
_MARKERS = "os^Dv"


def plot_auc_dots(
    table: Mapping[str, Mapping[str, Cell]],
    path: Path | str,
    *,
    title: str = "",
    interval: str = "95% interval",
    counts: Mapping[str, int] | None = None,
    unseen: Sequence[str] = (),
) -> Path:
    """AUC as dots, one row for each category and one dot for each series in it; a line spans its interval.

    The axis runs from the lowest value (chance, 0.5, is always in the figure and marked) to 1.

    Args:
        table: series -> category -> (AUC, low, high). An AUC of None has no dot, a low of None no line.
        path: the PNG file to write.
        title: heading of the figure.
        interval: what the lines span, for the caption.
        counts: category -> number of samples, shown beside its name.
        unseen: categories that are marked as unseen.

    Returns:
        The path.
    """
    categories = list(dict.fromkeys(category for values in table.values() for category in values))
    figure, ((axes,),) = new_figure(size=(7.0, 1.4 + len(categories) * (0.22 + 0.16 * len(table))))
    others = iter([(color, marker) for marker in _MARKERS for color in _OTHER_COLORS] * len(table))
    shown, spans, lowest = [], False, 0.5
    for index, (name, values) in enumerate(table.items()):
        color, marker = (METHOD_COLORS[name], "o") if name in METHOD_COLORS else next(others)
        for place, category in enumerate(categories):
            auc, low, high = values.get(category, (None, None, None))
            if auc is None:
                continue
            y = place + (index - (len(table) - 1) / 2) * 0.8 / max(1, len(table))
            if low is not None and high is not None:
                axes.plot([low, high], [y, y], color=color, linewidth=1.2, alpha=0.7)
                lowest, spans = min(lowest, low), True
            axes.plot(auc, y, marker, color=color, markersize=5, label=None if name in shown else name)
            shown.append(name)
            lowest = min(lowest, auc)
    axes.axvline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.annotate("chance", (0.5, 1.0), xycoords=("data", "axes fraction"), xytext=(2, 2), textcoords="offset points",
                  fontsize="small", color="grey")  # fmt: skip
    names = [f"{c} (unseen)" if c in unseen else c for c in categories]
    if counts:
        names = [f"{name}\nn = {counts[c]}" if c in counts else name for name, c in zip(names, categories)]
    axes.set_yticks(range(len(categories)), names)
    axes.set(xlim=(max(0.0, lowest - 0.03), 1.01), ylim=(len(categories) - 0.4, -0.6), title=title)
    axes.set_xlabel(f"AUC; lines: {interval}" if spans else "AUC; no intervals: too few independent samples")
    axes.grid(axis="x", alpha=0.3)
    if shown:
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    return save_figure(figure, path)


def plot_auc(runs: Mapping[str, Mapping[str, Any]], path: Path | str) -> Path:
    """AUC with 95% intervals of each run per data set and forgery method, from `metrics.evaluate_scores` results."""
    counts: dict[str, int] = {}
    for result in runs.values():
        counts |= auc_counts(result)
    table = {name: auc_cells(result) for name, result in runs.items()}
    return plot_auc_dots(table, path, title="AUC per forgery", counts=counts)


def label_layers(axes: Axes, layers: Sequence[str]) -> None:
    """The layers as labels of the y axis, from 0 on, by their short names."""
    names = [_short(layer) for layer in layers]
    axes.set_yticks(range(len(names)), names, fontsize=max(4, min(8, 300 / max(1, len(names)))))


def _short(layer: str) -> str:
    """The block number and the projection of a layer name: `...layer.3.attention.q_proj` -> `3.attention.q_proj`."""
    parts = layer.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] :]) if numbers else layer
