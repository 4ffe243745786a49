"""Tables: cells, intervals and warnings."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.config import MasmOptions
from masm_detect.data.sample import Sample
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.report.tables import auc_cells, format_cell, masks_line, results_table, speed_line
from scored_videos import small_result


@pytest.fixture
def result() -> dict:
    return small_result()


def test_tables_and_cells(result):
    cells = auc_cells(result)
    assert list(cells) == ["a", "b", "all"]
    value, low, high = cells["a"]
    assert 0 <= value <= 1 and low is high is None  # 4 groups a class: too few for an interval
    low, high = cells["all"][1:]
    assert low is high is None
    assert format_cell((0.8125, 0.75, 0.9)) == ".812 [.750, .900]"
    assert format_cell((1.0, None, None)) == "1.000" and format_cell((None, None, None)) == "-"
    table = results_table({"run": result})
    assert table.row_count == 3 and table.caption is None
    seen = {"groups": 2, "of_groups": 9, "samples": 4, "of_samples": 20}
    warned = results_table({"run": {**result, "seen_in_training": seen}})
    assert "2 of these 9 groups" in warned.caption and "not those of unseen data" in warned.caption
    alone = {**result, "datasets": {"reals": {"all": result["datasets"]["set"]["all"], "methods": {}}}}
    assert results_table({"run": alone}).row_count == 1  # no data set vanishes


def test_speed_in_words():
    metrics = {"images_per_second": 12.34, "seconds": 8.0, "waited": 2.0, "peak_memory_bytes": None, "gpu_busy": None}
    assert speed_line(metrics) == "training: 12.3 images/s, 25% of the time spent waiting for data"
    on_a_gpu = {**metrics, "peak_memory_bytes": 3 * 2**29, "gpu_busy": 0.875}
    assert speed_line(on_a_gpu).endswith("for data, peak memory 1.5 GiB, GPU busy 88% of the time")
    assert speed_line({**metrics, "seconds": 0.0}) == "training: 12.3 images/s"


def result_of(groups):
    samples = [
        Sample(f"{m}{i}", int(m != "real"), "set", m, f"set/{m}/{i}") for m in ("real", "a") for i in range(groups)
    ]
    return evaluate_scores(samples, np.random.default_rng(0).random(len(samples)))


@pytest.mark.parametrize(
    ("groups", "title"),
    [
        (20, "95% intervals by jackknife over groups"),
        (19, "no intervals (they need 20 groups of each class, none with over a fifth of it, and an AUC below 1)"),
    ],
)
def test_the_title_promises_intervals_only_where_there_are_some(groups, title):
    assert results_table({"run": result_of(groups)}).title == f"P(fake) against the label; {title}"


@pytest.mark.parametrize(
    ("seen", "message"),
    [
        ({"groups": 0, "files": 0}, None),
        ({"groups": 0, "files": 5}, "run was trained on 5 of these 20 images: its numbers are not those"),
        ({"groups": 2, "files": 5}, "run was trained on 5 of these 20 images, and 2 of these 9 groups"),
        ({"groups": 2, "files": 0}, "names of groups that run was trained on, though no file is the same: if"),
        ({"groups": 0, "files": 0, "near_copies": 3}, "3 of these 20 images look like images that run was trained on"),
        ({"groups": 2, "files": 0, "near_copies": 3}, "groups that run was trained on: its numbers are not those"),
        ({"groups": 2, "files": None}, "names of groups that run was trained on: its numbers are not those"),
    ],
    ids=str,
)
def test_images_that_were_trained_on_are_reported(seen, message):
    seen = {"of_groups": 9, "samples": 4, "of_samples": 20} | seen
    caption = results_table({"run": {**result_of(7), "seen_in_training": seen}}).caption
    assert caption is None if message is None else message in caption


def test_masks_that_were_never_selected_are_reported():
    short = {"method": "masm", "mask_history": [], "steps": 6}
    masked = MasmOptions(mask_policy="bias_variance", mask_warmup=20)
    assert "in 6 steps, so this is masm-nomask" in masks_line(short, masked)
    for other in ({"mask_history": [{}]}, {"method": "probe"}):
        assert masks_line(short | other, masked) == ""
    assert masks_line(short, MasmOptions()) == ""
    assert masks_line(short, MasmOptions(mask_policy="static")) == ""
