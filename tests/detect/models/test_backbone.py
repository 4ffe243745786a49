"""Backbones of every family, from small random checkpoints on disk, and the detector over them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from masm_detect.models.backbone import Backbone, BackboneError, load_backbone
from masm_detect.models.detector import Detector
from torch import nn

SMALL = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
DINO = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 40,
        "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}  # fmt: skip


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    t = transformers
    return {
        "clip": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**SMALL)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**DINO)),
        "vit": lambda: t.ViTModel(t.ViTConfig(**SMALL), add_pooling_layer=False),
        "siglip": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**SMALL)),
        "clip-full": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=SMALL)),
        "siglip-full": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=SMALL)),
    }[kind]().eval()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    return {k: make(k).save_pretrained(folder / k) or str(folder / k)
            for k in ("clip", "dinov2", "vit", "siglip", "clip-full", "siglip-full")}  # fmt: skip


PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["clip", "dinov2", "vit", "siglip", "clip-full", "siglip-full"])
def test_feature_is_the_pretrained_one(checkpoints, kind):
    backbone = load_backbone(checkpoints[kind], local_files_only=True)
    original = make(kind)
    original = original.vision_model if kind.endswith("-full") else original
    with torch.no_grad():
        output = original(pixel_values=PIXELS)
        expected = output.last_hidden_state[:, 0] if kind == "vit" else output.pooler_output
        features = backbone(PIXELS)
        if kind.startswith("clip"):
            expected = output.pooler_output
    assert features.shape == (2, backbone.feature_dim)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "vit", "siglip"])
def test_targets_match_every_projection_and_nothing_else(checkpoints, kind):
    backbone = load_backbone(checkpoints[kind])
    detector = Detector(backbone)
    linears = [n for n, m in detector.named_modules() if isinstance(m, nn.Linear)]
    for patterns, per_layer, names in (
        (backbone.attention_targets, 4, backbone.linear_names("attention")),
        (backbone.mlp_targets, 2, backbone.linear_names("mlp")),
    ):
        assert len(patterns) == per_layer
        hits = [n for n in linears if any(re.fullmatch(p.removeprefix("re:"), n) for p in patterns)]
        assert len(hits) == per_layer * 2
        assert hits == [f"backbone.model.{n}" for n in names]
        assert not any("head" in n for n in hits)  # SigLIP's pooling head, the detector's own head


@pytest.mark.parametrize("kind", ["clip", "dinov2", "vit", "siglip"])
def test_other_image_size(checkpoints, kind):
    backbone = load_backbone(checkpoints[kind], image_size=56)
    assert backbone(torch.zeros(1, 3, 56, 56)).shape == (1, 32)
    with pytest.raises(ValueError, match=r"\[B, 3, 56, 56\]"):
        backbone(PIXELS)
    with pytest.raises(BackboneError, match="multiple of the patch size 14"):
        load_backbone(checkpoints[kind], image_size=30)


@pytest.mark.parametrize("kind", ["clip", "dinov2", "vit", "siglip"])
def test_mean_pool_ignores_the_class_token(checkpoints, kind):
    backbone = load_backbone(checkpoints[kind], pool="mean")
    assert backbone(PIXELS).shape == (2, 32)


def test_pool_errors(checkpoints):
    with pytest.raises(BackboneError, match="no class token"):
        load_backbone(checkpoints["siglip"], pool="cls")
    with pytest.raises(BackboneError, match="no pretrained pooler"):
        load_backbone(checkpoints["vit"], pool="pooler")
    with pytest.raises(BackboneError, match="pool must be one of"):
        load_backbone(checkpoints["vit"], pool="max")


def test_pixel_statistics(checkpoints, tmp_path):
    assert load_backbone(checkpoints["clip"]).mean == pytest.approx((0.4815, 0.4578, 0.4082), abs=1e-4)
    assert load_backbone(checkpoints["dinov2"]).std == (0.229, 0.224, 0.225)
    make("vit").save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 2, 3]}')
    backbone = load_backbone(str(tmp_path))
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (1, 2, 3))


def test_checkpoint_with_a_missing_weight_is_refused(tmp_path):
    """transformers would only warn and leave the weight at random."""
    from safetensors.torch import load_file, save_file

    make("dinov2").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("fc1.weight"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="missing_keys"):
        load_backbone(str(tmp_path))


def test_unknown_names(tmp_path):
    with pytest.raises(BackboneError, match="only bundled model"):
        load_backbone("bundled:resnet")
    with pytest.raises(BackboneError, match="neither a local folder"):
        load_backbone(str(tmp_path / "nowhere"), local_files_only=True)
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match="'bert' model"):
        load_backbone(str(tmp_path))


def test_dinov2_defaults_to_224():
    config = transformers.Dinov2Config(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=518, patch_size=14
    )
    assert Backbone(transformers.Dinov2Model(config)).image_size == 224


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_detector_logits_are_float32(checkpoints, kind):
    detector = Detector(load_backbone(checkpoints[kind]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = detector(PIXELS)
    assert logits.shape == (2,) and logits.dtype == torch.float32
    logits.sum().backward()
    assert all(p.grad is not None for p in detector.head.parameters())
    half = Detector(load_backbone(checkpoints[kind], dtype=torch.bfloat16))
    assert half(PIXELS.bfloat16()).dtype == torch.float32


def test_a_backbone_that_draws_at_random_is_refused(tmp_path):
    """ViT-MAE drops three quarters of the patches at random, in eval mode too."""
    size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = transformers.ViTMAEModel(transformers.ViTMAEConfig(**size, image_size=32, patch_size=8))
    model.save_pretrained(tmp_path)
    before = torch.get_rng_state()
    with pytest.raises(BackboneError, match=r"ViTMAEModel\) gives other features for the same image each time"):
        load_backbone(str(tmp_path), local_files_only=True)
    assert torch.equal(before, torch.get_rng_state())


def test_a_backbone_with_another_input_is_refused(checkpoints, monkeypatch):
    def forward(self, pixel_values):
        raise ValueError("expected flattened patches")

    monkeypatch.setattr(Backbone, "forward", forward)
    with pytest.raises(BackboneError, match=r"cannot take an image of \d+ x \d+ pixels: expected flattened patches"):
        load_backbone(str(checkpoints["vit"]), local_files_only=True)
