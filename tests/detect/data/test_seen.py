"""What a run was trained on is recognised in a test set, by content and by name."""

from __future__ import annotations

import shutil

from masm_detect.config import EvalConfig, RuntimeConfig
from masm_detect.data.contents import fingerprints
from masm_detect.data.folders import read_folder
from masm_detect.data.seen import seen_in_training, write_groups
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.training.run import train
from tiny import run_config, write_data


def test_what_was_trained_on_is_known_by_content_and_by_name(tiny_data, tmp_path):
    samples = read_folder(tiny_data)
    files = fingerprints(samples)
    write_groups(tmp_path, samples[:20], samples[20:], files[:20])
    copied = read_folder(shutil.copytree(tiny_data, tmp_path / "renamed"))
    seen = seen_in_training(tmp_path, copied, fingerprints(copied))
    assert seen["files"] == 20 and seen["groups"] == seen["samples"] == 0 and seen["of_samples"] == 24
    other = write_data(tmp_path / "more" / "data", seed=1)
    others = read_folder(other)
    seen = seen_in_training(tmp_path, others, fingerprints(others))
    assert seen["files"] == 0 and seen["groups"] > 0  # other images of the same names
    assert seen_in_training(tmp_path, samples, files)["files"] == 20


def test_a_run_that_noted_no_files(tmp_path, tiny_data):
    samples = read_folder(tiny_data)
    (tmp_path / "groups.json").write_text('{"train": ["data/00"], "val": []}')
    assert seen_in_training(tmp_path, samples, fingerprints(samples))["files"] is None
    assert seen_in_training(tmp_path / "none", samples, []) is None


def test_a_renamed_copy_of_the_training_data_is_noticed(tiny_data, tiny_backbone, tmp_path):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    copy = shutil.copytree(tiny_data, tmp_path / "renamed")
    config = EvalConfig([str(tmp_path / "run")], [str(copy)], str(tmp_path / "eval"),
                        runtime=RuntimeConfig(progress=False))  # fmt: skip
    assert evaluate(config)["runs"]["run"]["seen_in_training"]["files"] == 20
