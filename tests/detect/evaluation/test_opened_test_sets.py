"""Evaluations of a run are recorded in its folder, and counted where a test set is opened again."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from masm_detect.commands.main import main
from masm_detect.data.contents import read_contents
from masm_detect.data.folders import read_folder
from masm_detect.evaluation.test_sets import FILE, record_evaluation
from masm_detect.report.tables import opening_lines
from masm_detect.results import read_json
from tiny import write_data
from trained_runs import tiny_run


def record(run, samples, evaluation, out="eval", **options):
    """Of an evaluation on samples: (earlier ones, those of other runs) for each data set and split."""
    found = record_evaluation(run, samples, read_contents(samples), out=out, evaluation=evaluation, **options)
    return {(e["dataset"], e["split"]): (e["opened_before"], e["opened_by_siblings"]) for e in found}


@pytest.fixture
def samples(tmp_path, seed):
    """24 samples of the split test."""
    return [replace(s, split="test") for s in read_folder(write_data(tmp_path / "set", seed))]


def test_it_is_counted_by_name_and_by_content(samples, tmp_path, seed):
    run = tmp_path / "run"
    run.mkdir()
    assert record(run, samples, "a", protocol="mine") == {("set", "test"): (0, 0)}
    assert record(run, samples[::3], "b") == {("set", "test"): (1, 0)}  # fewer frames of the same set
    # the same files in another order, place and data set
    moved = read_folder(shutil.copytree(tmp_path / "set", tmp_path / "moved"))
    assert record(run, [moved[i] for i in np.random.default_rng(seed).permutation(24)], "c") == {
        ("moved", None): (1, 0)
    }
    assert record(run, samples, "d") == {("set", "test"): (3, 0)}
    assert record(run, samples, "d") == {("set", "test"): (3, 0)}  # one command counts once
    other = read_folder(write_data(tmp_path / "other", seed + 1))
    assert record(run, other, "e") == {("other", None): (0, 0)}
    content = read_json(run / FILE)["evaluations"]
    assert [e["out"] for e in content] == ["eval"] * 6 and [e["protocol"] for e in content] == ["mine"] + [None] * 5
    assert [e["samples"] for e in content] == [24, 8, 24, 24, 24, 24]
    assert str(tmp_path) not in json.dumps(content)


def test_labels_belong_to_the_fingerprint(samples, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    record(run, samples, "a")
    exchanged = [replace(s, label=1 - s.label, dataset="x") for s in samples]
    assert record(run, exchanged, "b") == {("x", "test"): (0, 0)}


def test_other_splits_are_recorded_and_not_counted(samples, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    mixed = [replace(s, split=split) for s, split in zip(samples, ["val", "train", "test"] * 8)]
    for evaluation, before in (("a", 0), ("b", 1)):
        found = record(run, mixed, evaluation)
        assert found == {("set", "train"): (None, None), ("set", "val"): (None, None), ("set", "test"): (before, 0)}
    assert {e["split"] for e in read_json(run / FILE)["evaluations"]} == {"train", "val", "test"}


def test_runs_beside_it_with_the_same_training_data_count_apart(samples, tmp_path):
    for name, data in (("one", "a"), ("two", "a"), ("three", "b")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.yaml").write_text(f"data: {{paths: [{data}]}}\n")
    for name in ("three", "two"):
        record(tmp_path / "runs" / name, samples, name)
    assert record(tmp_path / "runs" / "one", samples, "x") == {("set", "test"): (0, 1)}
    assert record(tmp_path / "runs" / "two", samples, "x") == {("set", "test"): (1, 0)}  # of one command


def test_a_record_that_cannot_be_written_is_a_warning(samples, tmp_path):
    run = tmp_path / "run"
    (run / FILE / "in the way").mkdir(parents=True)
    with pytest.warns(UserWarning, match=f"not recorded in .*{FILE}"):
        assert record(run, samples, "a") == {("set", "test"): (0, 0)}
    shutil.rmtree(run / FILE)
    (run / FILE).write_text("[]")
    with pytest.warns(UserWarning, match="is no record of evaluations"):
        assert record(run, samples, "a") == {("set", "test"): (None, 0)}
    assert (run / FILE).read_text() == "[]"


def test_masm_eval_shows_the_count(tmp_path, capsys):
    run = tiny_run(tmp_path)
    command = ["eval", str(run), "--data", str(tmp_path / "data"), "--runtime.progress=false"]
    for number in range(3):
        assert main([*command, f"--out={tmp_path}/out{number}"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("test sets of run: data (data without splits) opened") == 2
    assert "opened once before." in out and "opened 2 times before." in out
    entry = read_json(tmp_path / "out2" / "results.json")["runs"]["run"]["test_sets"]
    assert [e["opened_before"] for e in entry] == [2] and len(read_json(run / FILE)["evaluations"]) == 3
    assert "opened 2 times before." in (tmp_path / "out2" / "report.html").read_text()
    assert "opened" not in (tmp_path / "out0" / "report.html").read_text()


def test_lines_of_the_report():
    entry = {"dataset": "D", "split": "test", "opened_before": 1, "opened_by_siblings": 4}
    (line,) = opening_lines("r", {"test_sets": [entry, entry | {"opened_before": None, "opened_by_siblings": None}]})
    assert line.startswith("test sets of r: D opened once before and 4 times by other runs beside it, trained on")
    (line,) = opening_lines("r", {"test_sets": [entry, entry | {"opened_by_siblings": 0, "split": None}]})
    assert "on the same data; D (data without splits) opened once before. Settings" in line
    assert opening_lines("r", {"test_sets": None}) == []
