"""Scoring: order, samples and splits kept; results that can be read back; tables and figures from them."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from masm_detect.config import ConfigError, DataConfig, EvalConfig, RuntimeConfig
from masm_detect.data.records import DatasetError, read_folder, write_deepfakebench
from masm_detect.evaluate import evaluate, predict, score_samples
from masm_detect.metrics import evaluate_scores
from masm_detect.report.plots import plot_auc, plot_auc_bars, plot_drift, plot_history, plot_masks
from masm_detect.report.tables import auc_cells, format_cell, results_table, speed_line
from masm_detect.results import read_json
from masm_detect.sources import frame_dataset


def test_scores_are_in_the_order_of_the_samples(tiny_data, tiny_detector):
    detector = tiny_detector()
    samples = read_folder(tiny_data)
    dataset = frame_dataset(samples, detector.backbone, DataConfig())
    together = predict(detector, dataset, batch_size=5)
    alone = torch.cat([predict(detector, frame_dataset([s], detector.backbone, DataConfig())) for s in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.dtype == torch.float32 and together.device.type == "cpu"
    assert torch.equal(together, predict(detector, dataset, batch_size=5, workers=2))
    scores = score_samples(detector, dataset)
    assert scores.dtype == np.float64 and scores.min() > 0 and scores.max() < 1
    np.testing.assert_allclose(scores, torch.sigmoid(together.double()).numpy())


@pytest.fixture
def result() -> dict:
    from masm_detect.data.records import Sample

    samples = [
        Sample(f"{m}{i}", int(m != "real"), "set", m, f"set/{m}/{i // 2}") for m in ("real", "a", "b") for i in range(8)
    ]
    scores = np.random.default_rng(0).random(len(samples))
    return {"method": "probe", **evaluate_scores(samples, scores, n_bootstrap=50)}


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


def test_unknown_split_is_named(tiny_data, tmp_path):
    config = EvalConfig(runs=["x"], paths=[str(tiny_data)], out=str(tmp_path), runtime=RuntimeConfig(progress=False))
    with pytest.raises(ConfigError, match="no sample has the split 'test'; its images have none"):
        evaluate(replace(config, split="test"))


def test_a_data_set_of_one_class_is_an_error(tiny_data, tmp_path):
    shutil.copytree(tiny_data / "real", tmp_path / "reals" / "real")
    config = EvalConfig(runs=["x"], paths=[str(tiny_data), str(tmp_path / "reals")], out=str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="all samples of the data set 'reals' are real"):
        evaluate(config)


def test_only_the_wanted_split_is_read(tiny_data, tmp_path):
    samples = read_folder(tiny_data)
    gone = [replace(s, split="train", path=s.path + "-gone", video=s.video + "x", group="") for s in samples]
    write_deepfakebench([*gone, *(replace(s, split="test") for s in samples)], tmp_path / "d.json")
    config = EvalConfig(runs=[str(tmp_path / "none")], paths=[str(tmp_path / "d.json")], out=str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="24 frames that do not exist"):
        evaluate(config)
    with pytest.raises(ConfigError, match=r"none/config\.yaml does not exist"):
        evaluate(replace(config, split="test"))
    with pytest.warns(UserWarning, match="24 frames"), pytest.raises(ConfigError, match=r"config\.yaml does not exist"):
        evaluate(replace(config, missing="skip"))


def test_two_runs_of_one_name_are_kept_apart(tiny_data, tiny_backbone, tmp_path):
    from masm_detect.config import MethodConfig, ModelConfig, OptimConfig, TrainConfig
    from masm_detect.train import train

    runs = [tmp_path / "one" / "run", tmp_path / "two" / "run"]
    for run in runs:
        train(
            TrainConfig(
                data=DataConfig(paths=[str(tiny_data)]),
                model=ModelConfig(backbone=str(tiny_backbone), image_size=28),
                method=MethodConfig(name="probe"),
                optim=OptimConfig(epochs=1),
                runtime=RuntimeConfig(progress=False),
                out=str(run),
            )
        )
    config = EvalConfig(
        runs=[str(run) for run in runs],
        paths=[str(tiny_data)],
        out=str(tmp_path / "eval"),
        n_bootstrap=10,
        runtime=RuntimeConfig(progress=False),
    )
    evaluate(config)
    saved = read_json(tmp_path / "eval" / "results.json")
    assert set(saved["runs"]) == {"run", "run-2"}
    assert saved["runs"]["run"]["datasets"] == saved["runs"]["run-2"]["datasets"]
    assert str(tmp_path) not in str(saved["config"]["runs"])
