"""`masm report`: the page and the numbers of every kind of run."""

from __future__ import annotations

import json

import pytest
import tiny
from command_line import assert_one_line, code_of


def report_of(run, *options):
    """The page and the numbers that `masm report` writes for a run."""
    assert code_of(["report", str(run), "--runtime.progress", "false", *options]) == 0
    page = (run / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and "<script" not in page and "src=" not in page
    return page, json.loads((run / "report.json").read_text())


def test_page_of_a_run_of_masm(tmp_path, capsys):
    run = tiny.trained_run(tmp_path)
    page, report = report_of(run)
    for title in ("Layer masks", "Random masks", "Angles between", "Singular values", "Subspaces switched off"):
        assert title in page
    metrics = json.loads((run / "metrics.json").read_text())
    assert report["masks"]["steps"] == [entry["step"] for entry in metrics["mask_history"]]
    assert report["ablation"]["n"] == metrics["samples"]["val"]
    assert report["ablation"]["source"] == "the validation data of the run"
    assert page.count("<svg") == 8
    assert code_of(["report", str(run), "--runtime.progress", "false"]) == 2
    assert_one_line(capsys.readouterr().err, "is there already: give another --out, or --overwrite")
    assert code_of(["report", str(run), "--out", str(run / "page.pdf")]) == 2
    assert_one_line(capsys.readouterr().err, "ends in .html")
    page, report = report_of(run, "--overwrite", "--ablation", "false")
    assert report["ablation"] is None and "Not measured" in page
    report_of(run, "--overwrite", "--data", str(run.parent / "data"), "--images", "10")


@pytest.mark.parametrize(
    ("method", "masm", "sentence"),
    [
        ("masm", {"mask_warmup": 1000}, "none was selected in"),
        ("masm", {"mask_policy": "static", "mask_calibration_batches": 2}, "This run selected no masks"),
        ("masm-nomask", {"num_subspaces": 1}, "This run selected no masks"),
    ],
)
def test_page_without_masks(tmp_path, method, masm, sentence):
    page, report = report_of(tiny.trained_run(tmp_path, method, **masm))
    assert sentence in page and report["masks"] is None and "Subspaces switched off" in page
    assert report["subspaces"] is not None


@pytest.mark.parametrize("method", ["probe", "full", "lora"])
def test_page_of_other_methods(tmp_path, method):
    if method == "lora":
        pytest.importorskip("peft")
    run = tiny.trained_run(tmp_path, method)
    page, report = report_of(run)
    assert "has no artifact subspaces and no layer masks, so their sections are left out." in page
    assert report["subspaces"] is report["ablation"] is report["masks"] is None
    changed = {"probe": 0, "full": 12, "lora": 8}[method]
    assert len(report["drift"]) == changed and all(row["drift"] > 0 for row in report["drift"])
    assert ("No linear layer of the backbone changed" in page) == (changed == 0)
