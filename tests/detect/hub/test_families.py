"""Every family of vision transformers as a model of transformers: saved, loaded by the Auto classes, equal."""

from __future__ import annotations

import json
from dataclasses import replace

import masm_detect.hub
import pytest
import tiny
import torch
import transformers
from command_line import code_of
from masm_detect.config import MasmOptions, MethodConfig
from masm_detect.data import content_cache
from masm_detect.evaluation.runs import load_run
from masm_detect.methods.adapters import base_sha256
from masm_detect.methods.build import build_method
from masm_detect.models.backbone import load_backbone
from masm_detect.models.detector import Detector
from masm_detect.training.run import train
from model_families import FAMILIES, SIZE, saved
from torch import nn

from masm_ext import MASMLinear

MASM = MethodConfig(name="masm", masm=MasmOptions(num_subspaces=2, subspace_rank=2))


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(family, tmp_path, seed):
    (tmp_path / "base").mkdir()
    name = saved(family, tmp_path / "base")
    detector = Detector(load_backbone(name, local_files_only=True))
    base = base_sha256(detector)
    build_method("masm", detector, MASM, seed=seed % 1000)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model = masm_detect.hub.DetectorForImageClassification.from_detector(
        detector.eval(), base_model=name, base_hash=base, method=MASM
    )
    pixels = torch.randn(3, 3, SIZE, SIZE)
    with torch.no_grad():
        expected = model(pixels).logits

    model.save_pretrained(tmp_path / "merged")
    assert str(tmp_path) not in (tmp_path / "merged" / "config.json").read_text()
    merged = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    layers = [m for m in merged.modules() if hasattr(m, "in_features") and hasattr(m, "out_features")]
    assert layers and all(isinstance(m, nn.Linear) for m in layers)
    with torch.no_grad():
        assert (merged(pixels).logits - expected).abs().max() < 2e-4
    # what was saved is not changed by saving
    assert any(isinstance(module, MASMLinear) for module in detector.modules())

    model.save_pretrained(tmp_path / "adapter", merged=False)
    size = sum(path.stat().st_size for path in (tmp_path / "adapter").rglob("*") if path.is_file())
    assert size < 2e6
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "adapter", local_files_only=True)
    with torch.no_grad():
        assert torch.equal(loaded(pixels).logits, expected)


@pytest.mark.parametrize("family", ["clip-l14", "dinov3", "siglip2", "perception-encoder", "open_clip"])
def test_export_of_a_run(family, tmp_path, monkeypatch, capsys):
    """`masm export --format hf` of a run on a backbone without an exact classifier in transformers; then a pipeline."""
    monkeypatch.setattr(content_cache, "default_cache_file", lambda: tmp_path / "contents.sqlite")
    (tmp_path / "base").mkdir()
    name = saved(family, tmp_path / "base")
    data = tiny.write_data(tmp_path / "data")
    config = tiny.run_config(data, name, tmp_path / "run")
    config = replace(config, optim=replace(config.optim, epochs=1), model=replace(config.model, image_size=None))
    train(config)
    arguments = ["export", str(tmp_path / "run"), "--format", "hf", "--out", str(tmp_path / "model")]
    assert code_of([*arguments, "--data", str(data), "--allow-fewer", "--progress", "false"]) == 0
    assert "needed: import masm_detect.hub, before transformers loads the folder: " in capsys.readouterr().out
    certificate = json.loads((tmp_path / "model" / "certificate.json").read_text())
    assert certificate["needed_import"]["module"] == "masm_detect.hub"
    assert certificate["difference_on_the_same_pixels"]["largest"] < 1e-4
    assert certificate["difference_from_image_files"]["masm_detect.hub"]["largest"] < 1e-4
    for file in ("config.json", "README.md", "certificate.json", "preprocessing.json", "preprocessor_config.json"):
        assert str(tmp_path) not in (tmp_path / "model" / file).read_text()
    assert "import masm_detect.hub" in (tmp_path / "model" / "README.md").read_text()
    image = str(next((data / "real").iterdir()))
    classify = transformers.pipeline("image-classification", model=str(tmp_path / "model"))
    scores = {entry["label"]: entry["score"] for entry in classify(image)}
    _, detector = load_run(tmp_path / "run")
    pixels = masm_detect.hub.DetectorImageProcessor.from_pretrained(tmp_path / "model")(
        transformers.image_utils.load_image(image)
    )["pixel_values"]
    with torch.no_grad():
        assert scores["fake"] == pytest.approx(float(detector.eval()(pixels).sigmoid()), abs=1e-5)
