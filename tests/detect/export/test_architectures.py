"""Which backbones and methods the plain model and transformers' classifiers reproduce exactly."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import tiny
import torch
import transformers
from masm_detect.config import DataConfig, MasmOptions, MethodConfig
from masm_detect.export.format import ExportError
from masm_detect.export.hf_format import HfFormat, classification_model, classifier_of
from masm_detect.export.plain import make_plain
from masm_detect.methods.build import build_method
from masm_detect.models.backbone import Backbone
from masm_detect.models.detector import Detector
from torch import nn

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8, "image_size": 32}


def backbone_model(kind: str) -> nn.Module:
    mlp = {"intermediate_size": 24}
    return {
        "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, mlp_ratio=2)),
        "registers": lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**SIZES, mlp_ratio=2, num_register_tokens=3)
        ),
        "vit": lambda: transformers.ViTModel(transformers.ViTConfig(**SIZES, **mlp), add_pooling_layer=False),
        "siglip": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZES, **mlp)),
        "clip": lambda: transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**SIZES, **mlp)),
    }[kind]()


@torch.no_grad()
def scramble(model: nn.Module) -> nn.Module:
    """Random values in every parameter: norms and position embeddings would start as ones and zeros."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("size", [32, 48])
@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        ("dinov2", "cls"),
        ("dinov2", "mean"),
        ("dinov2", "pooler"),
        ("registers", "cls"),
        ("registers", "mean"),
        ("vit", "cls"),
        ("siglip", "mean"),
    ],
)
def test_transformers_gives_the_logits(kind, pool, size, tmp_path, seed):
    detector = scramble(Detector(Backbone(backbone_model(kind), image_size=size, pool=pool)))
    classification_model(detector).save_pretrained(tmp_path)
    model = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        logits, expected = model(pixel_values=pixels).logits, detector(pixels)
    assert logits[:, 0].abs().max() == 0
    assert (logits[:, 1] - expected).abs().max() < 1e-4
    assert (logits.softmax(1)[:, 1] - expected.sigmoid()).abs().max() < 1e-5
    assert model.config.id2label == {0: "real", 1: "fake"}


@pytest.mark.parametrize(
    ("kind", "pool", "message"),
    [
        ("clip", "auto", "before CLIP's final norm"),
        ("siglip", "auto", "pools 'pooler'"),
        ("vit", "mean", "ViTForImageClassification reads cls"),
    ],
)
def test_what_transformers_does_not_compute_needs_our_model(kind, pool, message):
    detector = Detector(Backbone(backbone_model(kind), pool=pool))
    with pytest.raises(ExportError, match=message):
        classifier_of(detector.backbone)
    run = SimpleNamespace(detector=detector, config=SimpleNamespace(data=DataConfig(paths=["x"])))
    module, reason = HfFormat().needed_import(run)
    assert module == "masm_detect.hub" and re.search(message, reason)


def test_recompression_needs_our_image_processor():
    for size, needed in ((None, None), ((64, 90), "masm_detect.hub")):
        data = DataConfig(paths=["x"], normalize_first=size)
        found = HfFormat().needed_import(SimpleNamespace(detector=tiny.detector(), config=SimpleNamespace(data=data)))
        assert (found and found[0]) == needed


@pytest.mark.parametrize("method", ["probe", "full", "ln", "bitfit", "lora", "milora", "osf", "effort", "masm"])
def test_plain_layers_compute_what_the_method_does(method, seed):
    detector = tiny.detector(seed)
    config = MethodConfig(name=method, masm=MasmOptions(num_subspaces=2, subspace_rank=2))
    if method in ("lora", "milora", "osf", "effort"):
        pytest.importorskip("peft")
        config = MethodConfig(name=method, rank=2)
    build_method(method, detector, config, seed=seed % 1000)
    with torch.no_grad():
        for parameter in detector.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    pixels = torch.randn(3, 3, 28, 28)
    detector.eval()
    with torch.no_grad():
        expected = detector(pixels)
        make_plain(detector)
        assert (detector(pixels) - expected).abs().max() < 1e-4
    names = detector.backbone.linear_names("attention") + detector.backbone.linear_names("mlp")
    assert len(names) == 2 * 6 and all(type(detector.backbone.model.get_submodule(n)) is nn.Linear for n in names)
    assert set(detector.backbone.model.state_dict()) == set(tiny.detector().backbone.model.state_dict())
