"""Scoring trained runs: samples and splits kept, results that can be read back."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
from masm_detect.config import ConfigError, DataConfig, EvalConfig, RuntimeConfig
from masm_detect.data.deepfakebench import write_deepfakebench
from masm_detect.data.folders import read_folder
from masm_detect.data.sample import DatasetError
from masm_detect.evaluation.calibration import Calibration, save_calibration
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.evaluation.score_file import labelled, log_odds, read_scores, sigmoid
from masm_detect.results import read_json
from scored_videos import make


def test_unknown_split_is_named(tiny_data, tmp_path):
    config = EvalConfig(runs=["x"], paths=[str(tiny_data)], out=str(tmp_path), runtime=RuntimeConfig(progress=False))
    with pytest.raises(ConfigError, match="no sample has the split 'test'; its images have none"):
        evaluate(replace(config, split="test"))


def test_a_data_set_of_one_class_is_an_error(tiny_data, tmp_path):
    shutil.copytree(tiny_data / "real", tmp_path / "reals" / "real")
    config = EvalConfig(runs=["x"], paths=[str(tiny_data), str(tmp_path / "reals")], out=str(tmp_path / "out"))
    with pytest.raises(DatasetError, match="all samples of the data set 'reals' are real"):
        evaluate(config)


def test_only_the_requested_split_is_read(tiny_data, tmp_path):
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
    from masm_detect.training.run import train

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
        runtime=RuntimeConfig(progress=False),
    )
    save_calibration(runs[1], calibration(1.0, 0.0, 0.5), {})
    evaluate(config)
    saved = read_json(tmp_path / "eval" / "results.json")
    assert set(saved["runs"]) == {"run", "run-2"}
    first, second = (saved["runs"][name]["datasets"]["data"]["all"] for name in ("run", "run-2"))
    # no calibration, and one that changes nothing
    assert first.pop("video_accuracy_calibrated") is None
    assert second.pop("video_accuracy_calibrated") == second["video_accuracy"]
    assert first == second
    assert str(tmp_path) not in str(saved["config"]["runs"])
    # the kept scores give the same numbers, to the last bit
    samples, scores = labelled(read_scores(tmp_path / "eval" / "run" / "scores.csv"), "run")
    again = evaluate_scores(samples, scores)["datasets"]["data"]["all"]
    assert again | {"video_accuracy_calibrated": None} == first | {"video_accuracy_calibrated": None}
    assert {s.method for s in samples} == {"real", "stripes"} and all(s.group for s in samples)


def calibration(scale, offset, fake):
    """A calibration with this map and this upper threshold."""
    numbers = dict.fromkeys(("n_real", "n_fake", "n_real_groups", "n_fake_groups"), 20)
    rates = dict.fromkeys(("false_alarm_rate", "miss_rate", "share_of_fakes", "ece_before", "ece_after"), 0.1)
    return Calibration(scale=scale, offset=offset, thresholds={"fake": fake, "real": 0.2}, auc=0.7, **numbers, **rates)


def test_the_calibrated_threshold(seed):
    """Against the definition, video by video: sigmoid(scale * log odds of the mean score + offset) >= threshold."""
    samples, scores = make(n_videos=25, seed=seed)
    scale, offset, fake = np.random.default_rng(seed).uniform([0.5, -1, 0.2], [2, 1, 0.8])
    right = []
    for video in {s.video: s for s in samples}.values():
        mean = np.mean([p for s, p in zip(samples, scores) if s.video == video.video])
        right.append((sigmoid(scale * log_odds(mean) + offset) >= fake) == bool(video.label))
    result = evaluate_scores(samples, scores, calls_fake=calibration(scale, offset, fake).calls_fake)
    assert result["datasets"]["D"]["all"]["video_accuracy_calibrated"] == pytest.approx(np.mean(right))
