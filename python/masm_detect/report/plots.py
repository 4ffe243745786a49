"""Figures, each a function from plain numbers to one PNG file. No display is needed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from masm_ext.files import write_atomically

from .tables import auc_cells


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 4)) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches and its axes [rows, columns]."""
    # Without pyplot, which keeps global state and may look for a display.
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save_figure(figure: Figure, path: Path | str, dpi: int = 120) -> Path:
    """Write a figure as PNG, making the folder if needed; a reader sees the old file or the whole new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    image = io.BytesIO()
    # Without the software field the bytes depend on the numbers and the library only.
    figure.savefig(image, format="png", dpi=dpi, metadata={"Software": None})
    write_atomically(path, image.getvalue())
    return path


def plot_history(history: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
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
    return save_figure(figure, path)


def plot_drift(history: Sequence[Mapping[str, Any]], path: Path | str) -> Path:
    """||dW||_F / ||W||_F of each adapted layer after each epoch, as a heatmap (layers by epochs)."""
    layers = list(history[-1]["drift"])
    values = np.array([[entry["drift"][layer] for entry in history] for layer in layers])  # [L, epochs]
    figure, ((axes,),) = new_figure(size=(4 + 0.4 * len(history), 2 + 0.13 * len(layers)))
    image = axes.imshow(values, aspect="auto", cmap="viridis", interpolation="nearest")
    figure.colorbar(image, ax=axes, label="||dW|| / ||W||")
    axes.set(xlabel="epoch", xticks=range(len(history)), xticklabels=[entry["epoch"] for entry in history])
    _label_layers(axes, layers)
    return save_figure(figure, path)


def plot_masks(mask_history: Sequence[Mapping[str, Any]], layers: Sequence[str], path: Path | str) -> Path:
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
            _label_layers(axes, layers)
        else:
            axes.set_yticks([])
    states = (("active (learns)", 1.0), ("masked", 0.0))
    patches = [Patch(facecolor=colors(value), edgecolor="grey", label=label) for label, value in states]
    figure.legend(handles=patches, loc="outside upper right", ncols=2, fontsize="small", frameon=False)
    return save_figure(figure, path)


def plot_auc_bars(
    table: Mapping[str, Mapping[str, tuple[float | None, float | None, float | None]]],
    path: Path | str,
    *,
    title: str = "",
    unseen: Sequence[str] = (),
) -> Path:
    """Grouped bars: `table[series][category] = (auc, low, high)`, a bar a series in each category, whiskers its
    interval.

    Categories in `unseen` are marked as such. A value of None (not defined for these samples) has no bar.
    The axis begins at 0.3, or below the lowest value or whisker. Names that would overlap are rotated.
    """
    series = list(table)
    categories = list(dict.fromkeys(category for values in table.values() for category in values))
    figure, ((axes,),) = new_figure(size=(max(6.0, 1.5 + 0.28 * len(series) * len(categories)), 4.2))
    width = 0.8 / max(1, len(series))
    lowest = 1.0
    for index, name in enumerate(series):
        for place, category in enumerate(categories):
            auc, low, high = table[name].get(category, (None, None, None))
            if auc is None:
                continue
            x = place + (index - (len(series) - 1) / 2) * width
            label = name if not any(text == name for text in axes.get_legend_handles_labels()[1]) else None
            axes.bar(x, auc, width * 0.92, color=f"C{index}", label=label)
            lowest = min(lowest, auc)
            if low is not None and high is not None:
                axes.vlines(x, low, high, color="black", linewidth=1)
                lowest = min(lowest, low)
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.set(ylabel="AUC", ylim=(max(0.0, min(0.3, lowest - 0.05)), 1.02), title=title)
    axes.set_xticks(range(len(categories)), [f"{c}\n(unseen)" if c in unseen else c for c in categories])
    # Beside the bars, not over them.
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize="small", frameon=False)
    figure.canvas.draw()  # lays out the names, so that their extent is known
    boxes = [name.get_window_extent() for name in axes.get_xticklabels()]
    if any(left.x1 >= right.x0 for left, right in pairwise(boxes)):
        names = [f"{c} (unseen)" if c in unseen else c for c in categories]
        axes.set_xticks(range(len(categories)), names, rotation=45, ha="right", rotation_mode="anchor")
    return save_figure(figure, path)


def plot_auc(runs: Mapping[str, Mapping[str, Any]], path: Path | str) -> Path:
    """AUC with 95% intervals of each run per data set and forgery method, from `metrics.evaluate_scores` results."""
    return plot_auc_bars({name: auc_cells(result) for name, result in runs.items()}, path)


def _label_layers(axes: Axes, layers: Sequence[str]) -> None:
    names = [_short(layer) for layer in layers]
    axes.set_yticks(range(len(names)), names, fontsize=max(4, min(8, 300 / max(1, len(names)))))


def _short(layer: str) -> str:
    """The block number and the projection of a layer name: `...layer.3.attention.q_proj` -> `3.attention.q_proj`."""
    parts = layer.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[numbers[-1] :]) if numbers else layer
