"""The trackers with packages of their own (wandb, trackio, skipped without them), and several processes."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import tiny
from masm_detect.config_files import save_config
from masm_detect.results import read_json
from masm_detect.training.run import train
from tracked_runs import expected, history, scalars_of, tracked

pytest.importorskip("accelerate.tracking", reason="trackers are those of accelerate")


def needs(package: str) -> None:
    """Skip without the package; it is not imported here, because it reads its environment when it is imported."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def interrupted_and_resumed(data, backbone, out, name, monkeypatch) -> None:
    """A run that dies one step after a checkpoint, and is resumed."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.die_at(9, patch)
        train(tracked(data, backbone, out, name, every=1))
    train(tracked(data, backbone, out, name, every=1, resume=True))


def test_wandb_continues_its_run(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    needs("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    interrupted_and_resumed(tiny_data, tiny_backbone, tmp_path / "run", "wandb", monkeypatch)
    identity = read_json(tmp_path / "run" / "trackers.json")["id"]
    parts = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert {part.name for part in parts} == {f"run-{identity}.wandb"} and len(parts) == 2
    content = b"".join(part.read_bytes() for part in parts)
    for entry in history(tmp_path / "run"):
        assert str(entry["val_loss"]).encode() in content
    assert str(tmp_path / "data").encode() not in content


def test_trackio_continues_its_run(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    interrupted_and_resumed(tiny_data, tiny_backbone, tmp_path / "run", "trackio", monkeypatch)
    from trackio.sqlite_storage import SQLiteStorage

    [name] = SQLiteStorage.get_runs("masm")
    assert name == f"run-{read_json(tmp_path / 'run' / 'trackers.json')['id']}"
    logs = SQLiteStorage.get_logs("masm", name)
    found = [log for log in logs if "val/auc" in log]
    for log, entry in zip(found, history(tmp_path / "run"), strict=True):
        assert log["step"] == entry["step"]
        assert {key: log[key] for key in expected(entry)} == pytest.approx(expected(entry), rel=1e-9)


@pytest.mark.long
@pytest.mark.parametrize("processes", [1, 2])
def test_one_process_of_a_launcher_tracks(tiny_data, tiny_backbone, tmp_path, processes):
    needs("tensorboard")
    config = tracked(tiny_data, tiny_backbone, tmp_path / "run", "tensorboard", every=1)
    save_config(replace(config, runtime=replace(config.runtime, threads=1)), tmp_path / "config.yaml")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "masm_detect", "train", "--config", str(tmp_path / "config.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=180)
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.*"))) == 1
    found, entries = scalars_of(tmp_path / "run" / "tensorboard"), history(tmp_path / "run")
    assert [step for step, _ in found["step/loss"]] == list(range(1, 16))
    assert [value for _, value in found["val/loss"]] == pytest.approx([e["val_loss"] for e in entries], rel=1e-6)
