"""Figures of the report of a run, each from a part of `run_report.collect.run_report` to a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .plots import label_layers, new_figure

_ANGLES = ("between", "to_principal")
#: Colours of subspaces 1, 2, ...; they repeat.
_COLORS = ("tab:green", "tab:blue", "tab:orange", "tab:purple", "tab:red", "tab:brown")


def selection_figure(masks: Mapping[str, Any]) -> Figure:
    """How often each layer was selected, one panel a subspace, over the range of 95% of random counts."""
    counts = np.array(masks["counts"])  # [L, K]
    L, K = counts.shape
    figure, (panels,) = new_figure(1, K, (2.5 + 2.6 * K, 1.9 + 0.15 * L))
    for k, axes in enumerate(panels):
        low, high = masks["range"][k]
        axes.axvspan(low, high, color="0.88", label="95% of random counts")
        axes.axvline(masks["expected"][k], color="grey", linestyle=":", linewidth=1)
        axes.plot(counts[:, k], range(L), "o", color=_COLORS[k % len(_COLORS)], markersize=4)
        axes.set(title=f"subspace {k + 1}", xlabel="selections", ylim=(L - 0.5, -0.5))
        axes.set_xlim(-0.03 * len(masks["steps"]), 1.03 * len(masks["steps"]))
        if k == 0:
            label_layers(axes, masks["layers"])
        else:
            axes.set_yticks([])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", fontsize="small", frameon=False)
    return figure


def drift_dots(drift: Sequence[Mapping[str, Any]]) -> Figure:
    """||dW|| / ||W|| of each layer, as dots from 0."""
    figure, ((axes,),) = new_figure(size=(7, 1.2 + 0.15 * len(drift)))
    axes.plot([row["drift"] for row in drift], range(len(drift)), "o", color="black", markersize=4)
    axes.set(xlabel="||dW|| / ||W||", ylim=(len(drift) - 0.5, -0.5))
    axes.set_xlim(0, 1.05 * max(row["drift"] for row in drift) or 1)
    label_layers(axes, [row["name"] for row in drift])
    axes.grid(axis="x", alpha=0.3)
    return figure


def angles_figure(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """Smallest angles in degrees of each layer: between two subspaces, and of a subspace to the principal subspace."""
    figure, (panels,) = new_figure(1, 2, (9, 1.9 + 0.15 * len(layers)))
    every = [_smallest(layer[kind][side]) for layer in layers for kind in _ANGLES for side in ("output", "input")]
    lowest = 15 * int(max(0, min((value for value in every if value is not None), default=75) - 3) // 15)
    for axes, kind, title in zip(panels, _ANGLES, ("between two subspaces", "to the principal subspace")):
        for side, color, marker in (("output", "tab:blue", "o"), ("input", "tab:orange", "D")):
            values = [_smallest(layer[kind][side]) for layer in layers]
            places = [place for place, value in enumerate(values) if value is not None]
            axes.plot([values[p] for p in places], places, marker, color=color, markersize=4, label=f"{side} side")
        axes.axvline(90, color="grey", linestyle=":", linewidth=1)
        axes.set(title=title, xlabel="smallest principal angle, degrees", xlim=(lowest - 1, 91))
        axes.set_ylim(len(layers) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    label_layers(panels[0], [layer["name"] for layer in layers])
    panels[1].set_yticks([])
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=2, fontsize="small", frameon=False)
    return figure


def spectra_figure(spectra: Sequence[Mapping[str, Any]], drift: Mapping[str, float]) -> Figure:
    """Singular values of a few weights before and after training, and the places of the trained directions."""
    columns = min(2, len(spectra))
    rows = -(-len(spectra) // columns)
    figure, panels = new_figure(rows, columns, (4.8 * columns, 3 * rows))
    for axes, spectrum in zip(panels.flat, spectra):
        before, after = np.array(spectrum["before"]), np.array(spectrum["after"])
        floor = 1e-6 * before[0]  # of the logarithmic axis
        axes.semilogy(range(1, len(before) + 1), np.maximum(before, floor), color="black", label="pretrained")
        axes.semilogy(range(1, len(after) + 1), np.maximum(after, floor), color="tab:green", label="trained", alpha=0.8)
        if spectrum["trained"]:
            places = np.array(spectrum["trained"])
            axes.plot(places + 1, np.maximum(before[places], floor), "|", color="tab:red", label="trained directions")
        axes.set_title(f"{spectrum['name']}\n||dW|| / ||W|| = {drift[spectrum['name']]:.3g}", fontsize=8)
        axes.set(xlabel="number of the singular value", ylabel="singular value")
    for axes in panels.flat[len(spectra) :]:
        axes.set_axis_off()
    panels[0, 0].legend(fontsize="small", frameon=False)
    return figure


def ablation_figure(ablation: Mapping[str, Any]) -> Figure:
    """Difference of the AUC to that of all subspaces: a panel for each forgery method, a dot for each variant."""
    full, *others = ablation["variants"]
    parts = [(row["dataset"], row["method"]) for row in full["results"]]
    columns = min(3, len(parts))
    rows = -(-len(parts) // columns)
    figure, panels = new_figure(rows, columns, (2 + 2.7 * columns, rows * (1.3 + 0.24 * len(others))))
    names = [variant["name"] for variant in others]
    values = [0.0]
    for row in (row for variant in others for row in variant["results"] if row["difference"] is not None):
        values += [row["difference"], *(row["difference_ci"] or ())]
    room = 0.05 * (max(values) - min(values)) or 0.01
    for number, (axes, (dataset, method)) in enumerate(zip(panels.flat, parts)):
        for place, variant in enumerate(others):
            row = variant["results"][number]
            if row["difference"] is None:
                continue
            if row["difference_ci"] is not None:
                axes.plot(row["difference_ci"], [place, place], color="black", linewidth=1.2, alpha=0.7)
            axes.plot(row["difference"], place, "o", color="black", markersize=4)
        axes.axvline(0, color="grey", linestyle=":", linewidth=1)
        count = full["results"][number]
        axes.set_title(f"{dataset}: {method}\n{count['n_real']} real, {count['n_fake']} fake", fontsize=9)
        # one scale for all panels
        axes.set(xlabel="difference of AUC", xlim=(min(values) - room, max(values) + room))
        axes.set_ylim(len(others) - 0.5, -0.5)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.set_yticks(range(len(names)), names if number % columns == 0 else [""] * len(names), fontsize=8)
        axes.grid(axis="x", alpha=0.3)
    for axes in panels.flat[len(parts) :]:
        axes.set_axis_off()
    return figure


def _smallest(angles: Sequence[Any]) -> float | None:
    """The smallest of angles [K], or off the diagonal of [K][K]; None if there are none."""
    array = np.array(angles, dtype=float)
    if array.ndim == 2:
        array = array[~np.eye(len(array), dtype=bool)]
    return float(array.min()) if array.size else None
