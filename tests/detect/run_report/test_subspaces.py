"""Angles, drift and singular values, against scipy and dense weights."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from masm_detect.evaluation.runs import load_run
from masm_detect.models.detector import new_detector
from masm_detect.run_report.subspaces import base_weight, smallest_angle, subspace_report, weight_drift

from masm_ext import MASMLinear
from masm_ext.wrappers import modules_of


def test_angles_are_those_of_scipy(seed):
    a, b = (torch.linalg.qr(torch.randn(9, n, dtype=torch.float64)).Q.T for n in (3, 4))
    expected = np.degrees(scipy.linalg.subspace_angles(a.T.numpy(), b.T.numpy()).min())
    assert smallest_angle(a, b) == pytest.approx(expected, abs=1e-6)
    angle = np.radians(seed % 90)
    e = torch.eye(3, dtype=torch.float64)
    turned = np.cos(angle) * e[:1] + np.sin(angle) * e[1:2]
    assert smallest_angle(turned, e[:1]) == pytest.approx(seed % 90, abs=1e-5)
    assert smallest_angle(turned, e[:0]) == 90


@pytest.mark.parametrize("directions", ["trailing", "random", "gradient"])
def test_geometry_of_a_run(tmp_path, directions):
    run = tiny.trained_run(tmp_path, directions=directions, direction_batches=2)
    config, detector = load_run(run)
    base = new_detector(config.model)
    report = subspace_report(detector, progress=False)
    assert [row["name"] for row in report["layers"]] == list(modules_of(detector, MASMLinear))
    for row in report["layers"]:
        layer, pretrained = (
            detector.get_submodule(row["name"]),
            base.get_submodule(row["name"]).weight.detach().double(),
        )
        assert torch.allclose(base_weight(layer), pretrained, atol=1e-6)
        dense = layer.folded_weight().double()
        assert row["drift"] == pytest.approx(float((dense - pretrained).norm() / pretrained.norm()), rel=1e-3)
        for side, factor in (("output", layer.u), ("input", layer.v)):
            parts = [factor[a:b].detach().double().numpy().T for a, b in ((0, 2), (2, 4))]
            expected = np.degrees(scipy.linalg.subspace_angles(*parts).min())
            assert row["between"][side] == pytest.approx(np.array([[0, expected], [expected, 0]]), abs=1e-4)
            assert all(0 <= angle <= 90 for angle in row["to_principal"][side])
    for spectrum in report["spectra"]:
        before = torch.linalg.svdvals(base.get_submodule(spectrum["name"]).weight.double())
        after = torch.linalg.svdvals(detector.get_submodule(spectrum["name"]).folded_weight().double())
        assert spectrum["before"] == pytest.approx(before.tolist(), abs=1e-6)
        assert spectrum["after"] == pytest.approx(after.tolist(), abs=1e-6)
        assert len(spectrum["trained"]) == (0 if directions == "gradient" else 4)
    with torch.no_grad():  # before training, everything is orthogonal
        for layer in modules_of(detector, MASMLinear).values():
            layer.u.copy_(layer.u0)
            layer.v.copy_(layer.v0)
    for row in subspace_report(detector, progress=False)["layers"]:
        assert row["between"]["output"][0][1] == pytest.approx(90, abs=1e-3)
        if directions != "gradient":
            assert min(*row["to_principal"]["output"], *row["to_principal"]["input"]) == pytest.approx(90, abs=1e-3)


def test_drift_is_that_of_the_layers(tmp_path):
    run = tiny.trained_run(tmp_path)
    config, detector = load_run(run)
    expected = {name: layer.relative_update() for name, layer in modules_of(detector, MASMLinear).items()}
    found = {row["name"]: row["drift"] for row in weight_drift(detector, config.model)}
    assert found == pytest.approx(expected, rel=1e-3)
