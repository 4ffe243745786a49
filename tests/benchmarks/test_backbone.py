"""The benchmark of a backbone at full size, on a tiny one."""

from __future__ import annotations

import json

import pytest


def test_every_stage_is_measured(tmp_path, monkeypatch, capsys):
    backbone = pytest.importorskip("backbone")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    out = tmp_path / "result.json"
    assert backbone.main(["--model", "tiny", "--steps", "2", "--no-progress", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    stages = result["stages"]
    assert list(stages) == ["build", "convert", "first step", "step", "save adapter", "load adapter", "merge"]
    assert all(entry["seconds"] > 0 and entry["peak_bytes"] > 1e7 for entry in stages.values())
    assert stages["convert"]["layers"] == 8 and stages["save adapter"]["file_bytes"] > 1000
    # what was loaded is what was trained
    assert stages["load adapter"]["feature_difference"] == 0 and stages["merge"]["feature_difference"] < 1e-4
    assert "| merge |" in capsys.readouterr().out
    assert str(tmp_path) not in out.read_text()
