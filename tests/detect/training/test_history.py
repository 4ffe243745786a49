"""The file history.jsonl."""

from __future__ import annotations

from masm_detect.training.history import write_history


def test_history_has_no_nan(tmp_path):
    write_history(tmp_path, [{"epoch": 0, "train_loss": float("nan")}])
    assert (tmp_path / "history.jsonl").read_text() == '{"epoch": 0, "train_loss": null}\n'
