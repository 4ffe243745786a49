"""Subspaces switched off, against models that are put together by hand."""

from __future__ import annotations

import pytest
import tiny
import torch
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sources import read_dataset
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.evaluation.predict import score_samples
from masm_detect.evaluation.runs import load_run
from masm_detect.models.detector import new_detector
from masm_detect.run_report.ablation import ablation_report, switched_off, variants_of
from masm_detect.run_report.subspaces import base_weight

from masm_ext import MASMLinear
from masm_ext.wrappers import modules_of


@pytest.fixture
def run(tmp_path):
    return tiny.trained_run(tmp_path)


def test_a_subspace_switched_off_is_the_pretrained_one(run, seed):
    config, detector = load_run(run)
    detector.eval()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    pretrained = new_detector(config.model).eval()
    pretrained.head.load_state_dict(detector.head.state_dict())
    pixels = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        with switched_off(detector, (0, 1)):
            none = detector(pixels)
        assert (none - pretrained(pixels)).abs().max() < 1e-5
        full = detector(pixels)
        with switched_off(detector, (1,)):
            without_2 = detector(pixels)
        assert (full - none).abs().max() > 1e-4 and (without_2 - full).abs().max() > 1e-5
        layers = modules_of(detector, MASMLinear).values()
        for layer in layers:  # the same by hand: W of the start, and the change of subspace 1
            first = slice(0, layer.offsets[1])
            change = [(u[first].double().T * s[first].double()) @ v[first].double()
                      for u, s, v in ((layer.u, layer.s, layer.v), (layer.u0, layer.s0, layer.v0))]  # fmt: skip
            layer.wanted = base_weight(layer) + change[0] - change[1]
        for name in modules_of(detector, MASMLinear):
            pretrained.get_submodule(name).weight.copy_(detector.get_submodule(name).wanted)
        assert (without_2 - pretrained(pixels)).abs().max() < 1e-5
    assert all(torch.equal(before[name], value) for name, value in detector.state_dict().items())


def test_ablation_scores_each_variant(run):
    config, detector = load_run(run)
    samples = read_dataset(run.parent / "data")
    dataset = frame_dataset(samples, detector.backbone, config.data)
    report = ablation_report(detector, dataset, progress=False)
    assert [variant["name"] for variant in report["variants"]] == ["all subspaces", "without 1", "without 2", "none"]
    [full] = report["variants"][0]["results"]
    scores = score_samples(detector, dataset)
    assert full["auc"] == evaluate_scores(samples, scores)["datasets"]["data"]["all"]["auc"]
    assert full["difference"] is None and full["method"] == "stripes" and (full["n_real"], full["n_fake"]) == (12, 12)
    for variant in report["variants"][1:]:
        [row] = variant["results"]
        assert row["difference"] == pytest.approx(row["auc"] - full["auc"])
    assert [name for name, _ in variants_of(1)] == ["all subspaces", "none"]
    assert dict(variants_of(3))["only 2"] == (0, 2) and len(variants_of(3)) == 8
