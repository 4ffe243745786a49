"""`masm predict` and `masm eval` in two processes write what one process writes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import tiny
from command_line import code_of
from launched import finished, launch
from masm_detect.results import read_json

pytest.importorskip("accelerate", reason="several processes need accelerate")


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def same_tables(first: Path, second: Path) -> None:
    rows, others = table(first), table(second)
    assert len(rows) == len(others) > 0
    for row, other in zip(rows, others):
        for name, value in row.items():
            if value and name in ("p_fake", "logit", "p_calibrated"):
                assert float(other[name]) == pytest.approx(float(value), abs=1e-6), name
            else:
                assert other[name] == value, name


@pytest.mark.long
def test_two_processes_write_the_results_of_one(tmp_path):
    run = tiny.trained_run(tmp_path)
    data = str(tmp_path / "data")
    predict = ["predict", str(run), data, "--as-is", "--device", "cpu"]
    assert code_of([*predict, "--out", str(tmp_path / "one")]) == 0
    printed = finished(launch(2, *predict, "--out", str(tmp_path / "two")))
    same_tables(tmp_path / "one" / "scores.csv", tmp_path / "two" / "scores.csv")
    same_tables(tmp_path / "one" / "videos.csv", tmp_path / "two" / "videos.csv")
    assert not list((tmp_path / "two").glob("unfinished*")) and printed.count("scores.csv") == 1
    evaluate = ["eval", str(run), "--data", data, "--runtime.device", "cpu", "--as_is=true"]
    assert code_of([*evaluate, "--out", str(tmp_path / "eval-one")]) == 0
    finished(launch(2, *evaluate, "--out", str(tmp_path / "eval-two")))
    same_tables(tmp_path / "eval-one" / "run" / "scores.csv", tmp_path / "eval-two" / "run" / "scores.csv")
    results = [read_json(tmp_path / name / "results.json")["runs"]["run"] for name in ("eval-one", "eval-two")]
    assert results[0] == {**results[1], "test_sets": results[0]["test_sets"]}
