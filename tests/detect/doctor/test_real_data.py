"""On real forgeries `examine` finds what is known of these sets. Skipped without the folder `MASM_TEST_DATA`."""

from __future__ import annotations

import pytest
from masm_detect.doctor.examine import examine
from research_data import need


def report_of(*names: str) -> dict:
    return examine([str(folder) for folder in need(*names)], limit=60, progress=False)


@pytest.mark.long
def test_shortcuts_histories_and_shared_photographs():
    report = report_of("gan-faces", "ffhq-gan")
    assert report["errors"] == 0
    rows = {(row["dataset"], row["method"], row["property"]): row["auc"] for row in report["shortcuts"]}
    for method in ("stylegan3", "boredhumans-gan"):
        assert rows["gan-faces", method, "width"] == 1
    assert rows["gan-faces", "stylegan3", "format"] == 1 and rows["ffhq-gan", "stylegan1", "format"] == 0.5
    [between] = report["spectrum"]["between_reals"]
    assert between["auc"] > 0.9
    [alike] = [problem for problem in report["problems"] if problem["kind"] == "look-alike"]
    assert alike["count"] == 200  # all reals of gan-faces, at another size


@pytest.mark.long
def test_clean_pairs():
    report = report_of("dfdc-pairs")
    assert report["errors"] == 0 and {row["formats"]["JPEG"] for row in report["inventory"]} == {1400}
    # fakes that resemble their originals, whose names do not join them
    [alike] = [problem for problem in report["problems"] if problem["kind"] == "look-alike"]
    assert f"{alike['count']} of these are real and fake" in alike["message"]
    assert max(row["auc"] for row in report["shortcuts"]) < 0.6
