"""The times that a run reports, and its independence of the number of workers."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
from masm_detect.config import OptimConfig
from masm_detect.data.frames import FrameDataset
from masm_detect.results import read_json
from masm_detect.training import checkpoint
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import die_at, run_config


def slow_images(monkeypatch, seconds: float) -> None:
    real = FrameDataset.__getitem__

    def slow(*arguments):
        time.sleep(seconds)
        return real(*arguments)

    monkeypatch.setattr(FrameDataset, "__getitem__", slow)


def test_waiting_for_data_is_in_the_time(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    slow_images(monkeypatch, 0.01)
    result = train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    for entry in result.fit.history:
        assert 0.199 <= entry["waited"] < entry["seconds"]  # 20 images
        assert "peak_memory_bytes" not in entry and "gpu_busy" not in entry
    saved = read_json(tmp_path / "run" / "metrics.json")
    assert saved["waited"] == pytest.approx(sum(entry["waited"] for entry in result.fit.history))
    assert saved["seconds"] == pytest.approx(sum(entry["seconds"] for entry in result.fit.history))
    assert saved["images_per_second"] == pytest.approx(60 / saved["seconds"])
    assert saved["peak_memory_bytes"] is saved["gpu_busy"] is None


def test_writing_checkpoints_is_in_the_time(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    real = checkpoint.save

    def slow(*arguments):
        time.sleep(0.05)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1, batch_size=4))
    [entry] = train(config).fit.history
    assert entry["seconds"] >= entry["waited"] + 0.099  # after steps 2 and 4


def test_the_times_of_a_resumed_epoch_add_up(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        slow_images(patch, 0.05)
        die_at(9, patch)
        train(config)
    before = checkpoint.load(tmp_path / "run" / "last")["position"]
    assert before["batch"] == 3 and 0.599 <= before["waited"] < before["seconds"]
    entry = train(replace(config, resume=True)).fit.history[1]
    assert entry["waited"] > before["waited"] - 1e-3 and entry["seconds"] > before["seconds"]


def test_results_do_not_depend_on_the_workers(tiny_data, tiny_backbone, tmp_path):
    for workers in (None, 0, 2):
        config = run_config(tiny_data, tiny_backbone, tmp_path / str(workers), "probe")
        train(replace(config, runtime=replace(config.runtime, workers=workers)))
    assert_same_run(tmp_path / "None", tmp_path / "0")
    assert_same_run(tmp_path / "None", tmp_path / "2")
    config = run_config(tiny_data, tiny_backbone, tmp_path / "2", "probe", resume=True)
    train(replace(config, runtime=replace(config.runtime, workers=None)))  # not a setting that a run depends on
