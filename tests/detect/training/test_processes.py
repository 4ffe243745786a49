"""Several processes of a launcher train as one process, and a run outlives the death of one of them."""

from __future__ import annotations

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from launched import finished, launch, workers_of
from masm_detect.config_files import load_config, save_config
from masm_detect.evaluation.runs import load_run
from masm_detect.methods.trainable import trainable_state
from masm_detect.results import read_json
from masm_detect.training.checkpoint import load
from masm_detect.training.run import train

pytest.importorskip("accelerate", reason="several processes need accelerate")


def configured(folder: Path, method: str = "masm", quantize: str | None = None, workers: int = 0, **optim) -> Path:
    """The config file of a run in folder/run, of batches of five: two processes get three and two images."""
    data = tiny.write_data(folder / "data")
    tiny.detector().backbone.model.save_pretrained(folder / "backbone")
    config = tiny.run_config(data, folder / "backbone", folder / "run", method)
    options = {"batch_size": 5, "epochs": 2, **optim}
    config = replace(config, optim=replace(config.optim, **options))
    runtime = replace(config.runtime, threads=1, eval_batch_size=2, workers=workers)
    config = replace(config, runtime=runtime, method=replace(config.method, quantize=quantize))
    save_config(config, folder / "config.yaml")
    return folder / "config.yaml"


def command(config: Path, out: Path) -> list[str]:
    """The arguments that train as the config file says, into another folder."""
    return ["train", "--config", str(config), "--out", str(out)]


def same_as(first: Path, second: Path, tolerance: float) -> None:
    """Two run folders hold the same trained weights, masks and scores, up to rounding."""
    states = [trainable_state(load_run(folder)[1]) for folder in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=tolerance, atol=tolerance)
    entries = [[json.loads(line) for line in (f / "history.jsonl").read_text().splitlines()] for f in (first, second)]
    for a, b in zip(*entries):
        for name in ("epoch", "step", "images", "rate", "train_loss", "penalty", "val_auc", "val_loss"):
            assert b[name] == pytest.approx(a[name], rel=tolerance, abs=tolerance), name
        assert a.get("active_fraction") == b.get("active_fraction")
    changes = [read_json(folder / "metrics.json")["mask_history"] for folder in (first, second)]
    assert [change["mask"] for change in changes[0]] == [change["mask"] for change in changes[1]]


@pytest.mark.long
@pytest.mark.parametrize(
    "method, optim",
    [
        ("masm", {"quantize": "float8"}),
        ("lora", {"micro_batch": 2}),
        # of 20 images: the last batch holds one, so that both processes take it
        ("ln", {"alignment": 0.1, "uniformity": 0.5, "class_balance": True, "batch_size": 19}),
    ],
    ids=["masm in 8 bits", "lora in micro-batches", "ln with losses on features"],
)
def test_two_processes_give_the_numbers_of_one(tmp_path, method, optim):
    pytest.importorskip({"lora": "peft", "masm": "torchao"}.get(method, "torch"))
    config = configured(tmp_path, method, **optim)
    train(replace(load_config(config), out=str(tmp_path / "one")))
    finished(launch(2, *command(config, tmp_path / "two")))
    same_as(tmp_path / "one", tmp_path / "two", 2e-4)
    assert [read_json(tmp_path / name / "metrics.json")["processes"] for name in ("one", "two")] == [1, 2]


@pytest.mark.long
def test_a_killed_process_ends_the_run_and_resume_goes_on(tmp_path):
    config = configured(tmp_path, epochs=30)
    finished(launch(2, *command(config, tmp_path / "whole")))
    process = launch(2, *command(config, tmp_path / "cut"))
    checkpoint = tmp_path / "cut" / "last" / "state.json"
    wait_for(process, lambda: checkpoint.is_file() and load(checkpoint.parent)["position"]["epoch"] >= 1)
    [victim] = workers_of(process.pid)[-1:]
    os.kill(victim, signal.SIGKILL)
    text, _ = process.communicate(timeout=90)
    assert process.returncode != 0 and "SIGKILL" in text
    step = load(checkpoint.parent)["position"]["step"]
    assert 0 < step < 30 * 4
    finished(launch(2, *command(config, tmp_path / "cut"), "--resume"))
    same_as(tmp_path / "whole", tmp_path / "cut", 0.0)


@pytest.mark.long
def test_the_launcher_restarts_the_run_itself(tmp_path):
    config = configured(tmp_path, epochs=30)
    process = launch(2, *command(config, tmp_path / "run"), restarts=1)
    checkpoint = tmp_path / "run" / "last" / "state.json"
    wait_for(process, checkpoint.is_file)
    os.kill(workers_of(process.pid)[0], signal.SIGKILL)
    finished(process)
    assert len((tmp_path / "run" / "history.jsonl").read_text().splitlines()) == 30


@pytest.mark.long
def test_sigterm_to_all_processes_writes_a_checkpoint(tmp_path):
    # as a batch system or the launcher sends it: to every process of the group, those that read images among them
    config = configured(tmp_path, epochs=200, workers=1)
    process = launch(2, *command(config, tmp_path / "run"))
    checkpoint = tmp_path / "run" / "last"
    wait_for(process, lambda: (checkpoint / "state.json").is_file())
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=90)
    assert "whose checkpoint is written" in text and "WorkerDied" not in text, text
    assert 0 < load(checkpoint)["position"]["step"] < 200 * 4


def wait_for(process, ready) -> None:
    """Wait until `ready()`; the process must not end before."""
    started = time.monotonic()
    while not ready():
        assert process.poll() is None and time.monotonic() - started < 120, process.communicate()[0]
        time.sleep(0.05)
