"""Scoring trained runs: samples and splits kept, results that can be read back."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from masm_detect.config import ConfigError, DataConfig, EvalConfig, RuntimeConfig
from masm_detect.data.deepfakebench import write_deepfakebench
from masm_detect.data.folders import read_folder
from masm_detect.data.sample import DatasetError
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.results import read_json


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
    evaluate(config)
    saved = read_json(tmp_path / "eval" / "results.json")
    assert set(saved["runs"]) == {"run", "run-2"}
    assert saved["runs"]["run"]["datasets"] == saved["runs"]["run-2"]["datasets"]
    assert str(tmp_path) not in str(saved["config"]["runs"])
