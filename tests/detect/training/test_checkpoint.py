"""Checkpoints: whole or absent, checked when read, no pickle."""

from __future__ import annotations

import json
import math

import pytest
import torch
from masm_detect.errors import CheckpointError
from masm_detect.training import checkpoint


def state(step: int = 3) -> dict:
    return {
        "position": {"step": step},
        "tensors": [torch.arange(3), {"b": torch.ones(2, dtype=torch.bfloat16)}],
        "shared": (torch.zeros(2)[None].T, 1.5, None, "s", True),
        5: {"int key": 0.1 + 0.2, "nan": math.nan},
    }


def test_checkpoint_round_trip_is_exact(tmp_path):
    checkpoint.save(tmp_path, state())
    loaded = checkpoint.load(tmp_path)
    assert torch.equal(loaded["tensors"][0], torch.arange(3))
    assert loaded["tensors"][1]["b"].dtype == torch.bfloat16
    assert isinstance(loaded["shared"], tuple) and loaded["shared"][1:] == (1.5, None, "s", True)
    assert loaded[5]["int key"] == 0.1 + 0.2 and math.isnan(loaded[5]["nan"])


def test_checkpoint_replaces_the_last_one(tmp_path):
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path)["position"]["step"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000002.safetensors", "state.json"]


def test_leftovers_of_a_killed_writer_are_removed(tmp_path):
    (tmp_path / ".state-00000001.safetensors.abc.tmp").write_bytes(b"half")
    (tmp_path / ".state.json.abc.tmp").write_bytes(b"half")
    checkpoint.save(tmp_path, state(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state-00000002.safetensors", "state.json"]


def test_kill_before_the_commit_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path)["position"]["step"] == 1


def test_a_checkpoint_replaced_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))
    hashed = checkpoint.file_sha256

    def after_the_next_one(path):
        if path.name == "state-00000001.safetensors":
            checkpoint.save(tmp_path, state(2))
        return hashed(path)

    monkeypatch.setattr(checkpoint, "file_sha256", after_the_next_one)
    assert checkpoint.load(tmp_path)["position"]["step"] == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "json", "newer", "older", "foreign", "empty"])
def test_damaged_checkpoint_is_refused(tmp_path, damage):
    checkpoint.save(tmp_path, state())
    tensors, index = next(tmp_path.glob("*.safetensors")), tmp_path / "state.json"
    content = json.loads(index.read_text())
    if damage == "truncate":
        tensors.write_bytes(tensors.read_bytes()[:-1])
    elif damage == "flip":
        tensors.write_bytes(tensors.read_bytes()[:-1] + b"\x7f")
    elif damage == "remove":
        tensors.unlink()
    elif damage == "json":
        index.write_text(index.read_text()[:100])
    elif damage == "empty":
        index.unlink()
    else:
        content["format" if damage == "foreign" else "version"] = 1 if damage == "older" else 99
        index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        checkpoint.load(tmp_path)


def test_checkpoint_refuses_unknown_objects(tmp_path):
    with pytest.raises(TypeError, match="cannot hold a set"):
        checkpoint.save(tmp_path, {"position": {"step": 0}, "x": {1, 2}})
    assert not (tmp_path / "state.json").exists()
