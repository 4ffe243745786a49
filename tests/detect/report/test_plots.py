"""Figures: axes, names and legends."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from masm_detect.data.sample import Sample
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.report import plots
from masm_detect.report.plots import plot_auc, plot_auc_bars, plot_drift, plot_history, plot_masks


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn in a test, instead of files."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def bars(drawn, table, **options):
    """The axes of `plot_auc_bars` and the extent of each name below them."""
    plots.plot_auc_bars(table, "", **options)
    drawn[-1].canvas.draw()
    [axes] = drawn[-1].axes
    return axes, [name.get_window_extent() for name in axes.get_xticklabels()]


def test_every_bar_and_whisker_is_in_sight(drawn):
    for cell, lowest in (((0.125, None, None), 0.125), ((0.4, 0.2, 0.6), 0.2), ((0.0, None, None), 0.0)):
        axes, _ = bars(drawn, {"one": {"a": cell, "b": (0.9, 0.8, 1.0)}})
        assert 0 <= axes.get_ylim()[0] <= lowest and (lowest == 0 or axes.get_ylim()[0] < lowest)
    axes, _ = bars(drawn, {"one": {"a": (0.8, 0.7, 0.9), "b": (None, None, None)}})
    assert axes.get_ylim()[0] == 0.3


def test_names_below_the_bars_do_not_overlap(drawn):
    cell = (0.7, None, None)
    axes, boxes = bars(drawn, {"one": dict.fromkeys("abc", cell)}, unseen="c")
    assert [name.get_rotation() for name in axes.get_xticklabels()] == [0] * 3
    assert axes.get_xticklabels()[2].get_text() == "c\n(unseen)"
    names = [f"data set {d}: {method}" for d in "12" for method in ("upsample", "poisson", "all")]
    axes, boxes = bars(drawn, {"one": dict.fromkeys(names, cell)}, unseen=names[1:2])
    labels = axes.get_xticklabels()
    assert [name.get_rotation() for name in labels] == [45] * 6
    assert labels[1].get_text() == "data set 1: poisson (unseen)"
    # Lines at 45 degrees: their distance is that of where they end, over the square root of two.
    assert all((b.x1 - a.x1) / 2**0.5 > labels[0].get_fontsize() * drawn[-1].dpi / 72 for a, b in pairwise(boxes))
    assert all(box.y0 >= 0 for box in boxes)


def test_epochs_count_as_the_history_does(drawn):
    numbers = {"train_loss": 1.0, "val_loss": 0.7, "penalty": 0.1, "val_auc": 0.6, "drift": {"b.0.q": 0.1}}
    history = [{"epoch": epoch, **numbers} for epoch in range(3)]
    plots.plot_history(history, "")
    plots.plot_drift(history, "")
    for axes in (*drawn[0].axes, drawn[1].axes[0]):
        assert [name.get_text() for name in axes.get_xticklabels()] == ["0", "1", "2"]
    assert drawn[0].axes[0].lines[0].get_xdata().tolist() == [0, 1, 2]


def test_masks_have_a_legend(drawn):
    plots.plot_masks([{"step": step, "mask": [[1, 0], [0, 0]]} for step in range(3)], ["b.0.q", "b.0.k"], "")
    [legend] = drawn[0].legends
    colours = {text.get_text(): patch.get_facecolor() for text, patch in zip(legend.get_texts(), legend.get_patches())}
    image = drawn[0].axes[0].images[0]
    assert colours == {"active (learns)": image.to_rgba(1.0), "masked": image.to_rgba(0.0)}
    assert len(drawn[0].axes) == 2


@pytest.fixture
def result() -> dict:

    samples = [
        Sample(f"{m}{i}", int(m != "real"), "set", m, f"set/{m}/{i // 2}") for m in ("real", "a", "b") for i in range(8)
    ]
    scores = np.random.default_rng(0).random(len(samples))
    return {"method": "probe", **evaluate_scores(samples, scores, n_bootstrap=50)}


def test_figures_are_png(result, tmp_path):
    history = [
        {
            "epoch": e,
            "train_loss": 1 / (e + 1),
            "val_loss": 0.7,
            "penalty": 0.1,
            "val_auc": 0.6,
            "drift": {"b.0.q": 0.1 * e},
        }
        for e in range(3)
    ]
    masks = [{"step": step, "mask": np.random.default_rng(step).integers(0, 2, (1, 2)).tolist()} for step in range(9)]
    files = [
        plot_history(history, tmp_path / "h.png"),
        plot_drift(history, tmp_path / "d.png"),
        plot_masks(masks, ["b.0.q"], tmp_path / "m.png"),
        plot_auc({"one": result, "two": result}, tmp_path / "a.png"),
        plot_auc_bars({"one": {"a": (None, None, None)}}, tmp_path / "n.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert len(list(tmp_path.iterdir())) == len(files)
