"""Result files and checkpoints: whole or absent, checked when read, never pickle."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from masm_detect import checkpoint, results
from masm_detect.checkpoint import CheckpointError
from masm_detect.results import ResultError, check_output_folder, provenance, read_json, write_json, write_text


def test_json_has_no_nan_and_takes_numpy(tmp_path):
    write_json(tmp_path / "a" / "r.json", {"x": math.nan, "y": [np.float32(0.5), np.int64(3)], 4: (math.inf, True)})
    assert read_json(tmp_path / "a" / "r.json") == {"x": None, "y": [0.5, 3], "4": [None, True]}


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "r.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "\ud800")
    assert read_json(path) == {"old": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.json"]


def test_broken_json_is_named(tmp_path):
    (tmp_path / "r.json").write_text('{"a": ')
    with pytest.raises(ResultError, match=r"r\.json is not valid JSON"):
        read_json(tmp_path / "r.json")
    with pytest.raises(ResultError, match="cannot read"):
        read_json(tmp_path / "none.json")


def test_provenance_is_json_without_paths():
    content = json.dumps(provenance())
    assert torch.__version__.split("+")[0] in content
    assert "triton" in results._PACKAGES
    assert "/home" not in content and "/root" not in content and "/work" not in content


def test_provenance_of_a_gpu(monkeypatch):
    properties = SimpleNamespace(name="a GPU", major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(results, "Meter", lambda device: SimpleNamespace(driver=lambda: f"driver of {device}"))
    wanted = {"type": "cuda", "name": "a GPU", "capability": "9.0", "cuda": "13.0", "driver": "driver of cuda:1"}
    assert provenance("cuda:1")["device"] == wanted


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


def test_output_folder_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    check_output_folder(tmp_path / "new" / "folder")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResultError, match="file is a file"):
            check_output_folder(path)


def test_kill_before_the_commit_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, state(2))
    assert checkpoint.load(tmp_path)["position"]["step"] == 1


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


def test_trainable_state_is_strict():
    model = torch.nn.Linear(2, 3)
    saved = checkpoint.trainable_state(model)
    with pytest.raises(CheckpointError, match=r"1 missing.*bias"):
        checkpoint.load_trainable_state(model, {"weight": saved["weight"]})
    with pytest.raises(CheckpointError, match="1 unexpected"):
        checkpoint.load_trainable_state(model, saved | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"saved \[2\], but the model has \[3\]"):
        checkpoint.load_trainable_state(model, saved | {"bias": torch.zeros(2)})


def test_frozen_hash_sees_frozen_weights_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    start = checkpoint.frozen_sha256(model)
    with torch.no_grad():
        model[1].weight.add_(1)
    assert checkpoint.frozen_sha256(model) == start
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert checkpoint.frozen_sha256(model) != start
