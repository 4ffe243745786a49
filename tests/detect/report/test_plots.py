"""Figures: axes, names and legends."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from masm_detect.report import plots
from masm_detect.report.plots import plot_auc, plot_auc_dots, plot_drift, plot_history, plot_masks
from scored_videos import small_result


@pytest.fixture
def drawn(monkeypatch):
    """The figures drawn in a test, instead of files."""
    figures = []
    monkeypatch.setattr(plots, "save_figure", lambda figure, path: figures.append(figure))
    return figures


def dots(drawn, table, **options):
    """The axes of `plot_auc_dots`."""
    plots.plot_auc_dots(table, "", **options)
    drawn[-1].canvas.draw()
    [axes] = drawn[-1].axes
    return axes


def test_every_dot_and_interval_is_in_sight_and_chance_is_marked(drawn):
    for cell, lowest in (((0.125, None, None), 0.125), ((0.4, 0.2, 0.6), 0.2), ((0.0, None, None), 0.0)):
        axes = dots(drawn, {"one": {"a": cell, "b": (0.9, 0.8, 1.0)}})
        assert 0 <= axes.get_xlim()[0] <= lowest and axes.get_xlim()[1] > 1
    axes = dots(drawn, {"one": {"a": (0.8, 0.7, 0.9), "b": (None, None, None)}})
    assert axes.get_xlim()[0] < 0.5 and any(line.get_xdata()[0] == 0.5 for line in axes.lines)
    assert sum(line.get_marker() == "o" for line in axes.lines) == 1  # no dot where nothing is known


def test_the_figure_says_what_the_lines_and_the_numbers_are(drawn):
    axes = dots(drawn, {"probe": {"a": (0.8, 0.7, 0.9)}}, counts={"a": 40}, unseen=["a"], title="t")
    assert axes.get_xlabel() == "AUC; lines: 95% interval" and axes.get_title() == "t"
    assert axes.get_yticklabels()[0].get_text() == "a (unseen)\nn = 40"
    axes = dots(drawn, {"probe": {"a": (0.8, None, None)}})
    assert "no intervals" in axes.get_xlabel()


def test_a_method_has_one_colour_in_every_figure(drawn):
    cell = {"a": (0.8, None, None)}
    for table in ({"masm": cell, "probe": cell}, {"probe": cell, "other": cell, "masm": cell}):
        axes = dots(drawn, table)
        legend = axes.get_legend()
        colours = {t.get_text(): line.get_color() for t, line in zip(legend.get_texts(), legend.get_lines())}
        assert colours["masm"] == plots.METHOD_COLORS["masm"] and colours["probe"] == plots.METHOD_COLORS["probe"]
        assert len(set(colours.values())) == len(table)


def test_names_beside_the_dots_do_not_overlap(drawn):
    names = [f"data set {d}: {method}" for d in "12" for method in ("upsample", "poisson", "all")]
    axes = dots(drawn, {"one": dict.fromkeys(names, (0.7, None, None))}, counts=dict.fromkeys(names, 9))
    boxes = [name.get_window_extent() for name in axes.get_yticklabels()]
    assert all(lower.y1 <= upper.y0 for upper, lower in pairwise(boxes)) and all(box.x0 >= 0 for box in boxes)


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
    return small_result()


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
        plot_auc_dots({"one": {"a": (None, None, None)}}, tmp_path / "n.png"),
    ]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert len(list(tmp_path.iterdir())) == len(files)
