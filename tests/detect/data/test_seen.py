"""What a run was trained on is recognised in a test set, by content and by name."""

from __future__ import annotations

import shutil
from pathlib import Path

from masm_detect.config import EvalConfig, RuntimeConfig
from masm_detect.data.contents import read_contents
from masm_detect.data.folders import read_folder
from masm_detect.data.seen import seen_in_training, write_groups
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.training.run import train
from pictures import write_picture
from tiny import run_config, write_data


def test_what_was_trained_on_is_known_by_content_and_by_name(tiny_data, tmp_path):
    samples = read_folder(tiny_data)
    contents = read_contents(samples)
    write_groups(tmp_path, samples[:20], samples[20:], contents[:20])
    copied = read_folder(shutil.copytree(tiny_data, tmp_path / "renamed"))
    seen = seen_in_training(tmp_path, copied, read_contents(copied))
    assert seen["files"] == 20 and seen["groups"] == seen["samples"] == 0 and seen["of_samples"] == 24
    other = write_data(tmp_path / "more" / "data", seed=1)
    others = read_folder(other)
    seen = seen_in_training(tmp_path, others, read_contents(others))
    assert seen["files"] == 0 and seen["groups"] > 0  # other images of the same names
    assert seen_in_training(tmp_path, samples, contents)["files"] == 20


def test_recompressed_copies_of_training_images_are_counted(tmp_path):
    for i in range(12):
        write_picture(tmp_path / "set" / ("real" if i % 2 else "fake-x") / f"{i}.jpg", i)
    samples = read_folder(tmp_path / "set")
    write_groups(tmp_path, samples[:8], samples[8:], read_contents(samples)[:8])
    for i in range(4):
        write_picture(tmp_path / "later" / "real" / f"new name {i}.jpg", i, side=72, quality=50)
    write_picture(tmp_path / "later" / "real" / "new picture.jpg", 99)
    later = read_folder(tmp_path / "later")
    trained = {int(Path(s.path).stem) for s in samples[:8]}
    seen = seen_in_training(tmp_path, later, read_contents(later))
    assert seen["files"] == 0 and seen["near_copies"] == len(trained & {0, 1, 2, 3})


def test_runs_of_older_versions(tmp_path, tiny_data):
    samples = read_folder(tiny_data)
    contents = read_contents(samples)
    (tmp_path / "groups.json").write_text('{"train": ["data/00"], "val": []}')
    seen = seen_in_training(tmp_path, samples, contents)
    assert seen["files"] is None and seen["near_copies"] is None
    (tmp_path / "groups.json").write_text(f'{{"train": [], "val": [], "train_files": ["{contents[0].fingerprint}"]}}')
    seen = seen_in_training(tmp_path, samples, contents)
    assert seen["files"] == 1 and seen["near_copies"] is None
    assert seen_in_training(tmp_path / "none", samples, []) is None


def test_a_renamed_copy_of_the_training_data_is_noticed(tiny_data, tiny_backbone, tmp_path):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    copy = shutil.copytree(tiny_data, tmp_path / "renamed")
    runtime = RuntimeConfig(progress=False)
    config = EvalConfig(runs=[str(tmp_path / "run")], paths=[str(copy)], out=str(tmp_path / "eval"), runtime=runtime)
    assert evaluate(config)["runs"]["run"]["seen_in_training"]["files"] == 20
