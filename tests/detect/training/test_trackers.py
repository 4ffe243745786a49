"""What the trackers receive is what history.jsonl holds, also after a resume; a tracker that fails ends nothing."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import tiny
from masm_detect.config import ConfigError, RuntimeConfig
from masm_detect.results import read_json
from masm_detect.training.run import train
from masm_detect.training.schedule import one_cycle
from masm_detect.training.step_losses import StepLosses
from masm_detect.training.trackers import Trackers, check_trackers, hyperparameters
from run_folders import assert_same_run
from tracked_runs import EPOCHS, STEPS, expected, history, scalars_of, tracked

tracking = pytest.importorskip("accelerate.tracking", reason="trackers are those of accelerate")


class Recorder(tracking.GeneralTracker):
    """Keeps what it receives; `broken` names the call that fails."""

    name, requires_logging_directory, main_process_only = "recorder", True, True
    broken = ""

    def __init__(self, project, folder):
        super().__init__()
        self.folder, self.received, self.settings, self.finished = folder, [], {}, False

    @property
    def tracker(self):
        return self

    def start(self):
        type(self).last = self
        self._fail("start")

    def store_init_configuration(self, values):
        self.settings = values

    def log(self, values, step=None, **_):
        self._fail("log")
        self.received.append((step, dict(values)))

    def finish(self):
        self.finished = True
        self._fail("finish")

    def _fail(self, call):
        if self.broken == call:
            raise ConnectionError("the server\ndoes not answer")


@pytest.fixture
def recorder(monkeypatch):
    kind = type("Fresh", (Recorder,), {})
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", kind)
    return kind


def test_steps_epochs_and_settings_arrive(tiny_data, tiny_backbone, tmp_path, recorder):
    result = train(tracked(tiny_data, tiny_backbone, tmp_path / "run", "recorder"))
    found, entries = recorder.last, history(tmp_path / "run")
    assert found.finished and found.folder == str(tmp_path / "run" / "recorder")
    steps = {step: values for step, values in found.received if "step/loss" in values}
    assert list(steps) == list(range(2, EPOCHS * STEPS + 1, 2))
    epochs = [(step, values) for step, values in found.received if "val/auc" in values]
    assert [step for step, _ in epochs] == [entry["step"] for entry in entries] == [5, 10, 15]
    for (_, values), entry in zip(epochs, entries):
        assert values == pytest.approx(expected(entry), rel=1e-12)
        assert len(entry["active_by_subspace"]) == 2
        assert np.mean(entry["active_by_subspace"]) == pytest.approx(entry["active_fraction"], abs=1e-6)
    groups = result.method.optimizer.param_groups
    for step, values in steps.items():
        fraction = one_cycle(step - 1, EPOCHS * STEPS, 0.1, 0.01)
        rates = [value for name, value in values.items() if name.startswith("lr/")]
        assert rates == pytest.approx([group["initial_lr"] * fraction for group in groups])
        assert "lr/head" in values and "lr/s/0" in values
    assert found.settings["optim.epochs"] == EPOCHS
    assert found.settings["data.paths"] == json.dumps([Path(tiny_data).name])
    assert not [value for value in found.settings.values() if str(tmp_path) in str(value)]


def test_losses_that_arrive_late_keep_their_step_and_rate(tiny_data, tiny_backbone, tmp_path, recorder, monkeypatch):
    """As on CUDA, where the loss of a step is read after the next one was launched."""
    received, real = [], StepLosses._read
    for folder, late in (("at-once", False), ("late", True)):
        if late:
            monkeypatch.setattr(StepLosses, "_read", lambda self, left: real(self, 2))
            monkeypatch.setattr(StepLosses, "drain", lambda self: real(self, 0))
        train(tracked(tiny_data, tiny_backbone, tmp_path / folder, "recorder", every=1, method="probe"))
        received.append({step: values for step, values in recorder.last.received if "step/loss" in values})
    assert received[0] == received[1] and len(received[0]) == EPOCHS * STEPS


def test_every_step_gives_the_loss_of_the_epoch(tiny_data, tiny_backbone, tmp_path, recorder):
    train(tracked(tiny_data, tiny_backbone, tmp_path / "run", "recorder", every=1, method="probe"))
    losses = [values["step/loss"] for _, values in recorder.last.received if "step/loss" in values]
    sizes = [4, 4, 4, 4, 3] if len(losses) == 15 else []
    for entry in history(tmp_path / "run"):
        part = losses[entry["step"] - STEPS : entry["step"]]
        sizes = [4] * (STEPS - 1) + [entry["images"] - 4 * (STEPS - 1)]
        assert np.dot(part, sizes) / entry["images"] == pytest.approx(entry["train_loss"], rel=1e-6)
    names = {name for _, values in recorder.last.received for name in values}
    assert not [name for name in names if name.startswith(("masks/", "drift/"))]


def test_tensorboard_files_hold_the_history_also_after_a_resume(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tracked(tiny_data, tiny_backbone, whole, "tensorboard", every=1))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.die_at(9, patch)  # the last checkpoint is that of step 8: step 9 is tracked twice
        train(tracked(tiny_data, tiny_backbone, cut, "tensorboard", every=1))
    train(tracked(tiny_data, tiny_backbone, cut, "tensorboard", every=1, resume=True))
    assert_same_run(whole, cut)
    for folder in (whole, cut):
        found, entries = scalars_of(folder / "tensorboard"), history(folder)
        for name in expected(entries[0]):
            values = [(entry["step"], float(np.float32(expected(entry)[name]))) for entry in entries]
            assert found[name] == values, name  # the files hold float32
        assert [step for step, _ in found["step/loss"]] == list(range(1, EPOCHS * STEPS + 1))
    first, second = (scalars_of(folder / "tensorboard") for folder in (whole, cut))
    assert {k: v for k, v in first.items() if "per_second" not in k} == {
        k: v for k, v in second.items() if "per_second" not in k
    }
    assert len(list((cut / "tensorboard").glob("events.*"))) == 2
    [settings] = (cut / "tensorboard").glob("*/hparams.yml")  # stored once
    assert "optim.epochs: 3" in settings.read_text()


@pytest.mark.parametrize("call", ["start", "log", "finish"])
def test_a_tracker_that_fails_ends_nothing(tiny_data, tiny_backbone, tmp_path, recorder, call):
    recorder.broken = call
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train(tracked(tiny_data, tiny_backbone, tmp_path / "run", "recorder", every=1, method="probe"))
    [message] = [str(warning.message) for warning in seen if "recorder" in str(warning.message)]
    assert message == "recorder failed (the server does not answer); training goes on without this tracker"
    assert len(history(tmp_path / "run")) == EPOCHS
    assert read_json(tmp_path / "run" / "metrics.json")["steps"] == EPOCHS * STEPS


def test_trackers_change_no_result_and_leave_accelerate_alone(tiny_data, tiny_backbone, tmp_path, recorder):
    from accelerate import PartialState

    before = dict(PartialState._shared_state)
    train(tracked(tiny_data, tiny_backbone, tmp_path / "with", "recorder"))
    train(tracked(tiny_data, tiny_backbone, tmp_path / "without"))
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert dict(PartialState._shared_state) == before
    assert not (tmp_path / "without" / "trackers.json").exists()


def test_a_resumed_run_may_track_otherwise(tiny_data, tiny_backbone, tmp_path, recorder, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.die_at(9, patch)
        train(tracked(tiny_data, tiny_backbone, tmp_path / "run", method="probe"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(tracked(tiny_data, tiny_backbone, tmp_path / "run", "recorder", every=1, method="probe", resume=True))
    assert min(step for step, _ in recorder.last.received) == 9  # the last checkpoint is that of step 8
    assert recorder.last.settings["optim.epochs"] == EPOCHS


def test_trackers_of_other_processes_do_nothing(tmp_path):
    trackers = Trackers()
    with trackers.running(0):
        trackers.epoch({"step": 1})
    assert not list(tmp_path.iterdir())


def test_unknown_and_absent_trackers_are_refused(monkeypatch):
    with pytest.raises(ConfigError, match=r"'tensorbord', which is no tracker .* give some of .*tensorboard"):
        check_trackers(["tensorbord"])
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match="'wandb', whose package is not installed: pip install wandb"):
        check_trackers(["wandb"])
    with pytest.raises(ConfigError, match=r"runtime.trackers is .*; it must be a list of different names"):
        RuntimeConfig(trackers=["wandb", "wandb"])
    with pytest.raises(ConfigError, match=r"runtime.track_every is 0"):
        RuntimeConfig(track_every=0)


def test_hyperparameters_hold_no_folders_of_this_machine():
    config = {
        "paths": ["/home/someone/faces/mine.json", "data/mine.json", "hf:/srv/sets/celeb", "hf:owner/set", "C:\\x\\y"],
        "model": {"backbone": "openai/clip-vit-large-patch14", "size": None},
        "folder": "~/weights/vit/",
        "prefix_map": {"/data/ff": "/scratch/ff"},
        "rates": (1e-3, 2),
        "empty": {},
    }
    assert hyperparameters(config) == {
        "paths": json.dumps(["mine.json", "data/mine.json", "hf:celeb", "hf:owner/set", "y"]),
        "model.backbone": "openai/clip-vit-large-patch14",
        "model.size": None,
        "folder": "vit",
        "prefix_map.ff": "ff",
        "rates": "[0.001, 2]",
        "empty": "[]",
    }
    assert math.isclose(json.loads(hyperparameters(config)["rates"])[0], 1e-3)
