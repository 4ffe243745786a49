"""Vision transformers of timm as backbones, from small random checkpoints; and what is refused, with the reason."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
import transformers
from masm_detect.config import MasmOptions, MethodConfig
from masm_detect.methods.build import build_method
from masm_detect.models import timm_wrapper
from masm_detect.models.backbone import BackboneError, load_backbone
from masm_detect.models.detector import Detector
from torch import nn

from masm_ext import MASMLinear

HAS_TIMM = importlib.util.find_spec("timm") is not None
needs_timm = pytest.mark.skipif(not HAS_TIMM, reason="timm is not installed (the extra timm)")

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "img_size": 32, "patch_size": 8}


def make(architecture: str = "vit_tiny_patch16_224", **arguments) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.TimmWrapperConfig(architecture=architecture, model_args=SMALL | arguments)
    return transformers.TimmWrapperModel(config).eval()


def save(folder, **arguments) -> str:
    make(**arguments).save_pretrained(folder)
    return str(folder)


@needs_timm
@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_feature_is_that_of_timm(tmp_path, pool):
    arguments = {"global_pool": pool, "class_token": pool == "token"}
    backbone = load_backbone(save(tmp_path, **arguments), local_files_only=True)
    assert (backbone.image_size, backbone.patch_size, backbone.feature_dim, backbone.pool) == (32, 8, 32, "pooler")
    with torch.no_grad():
        expected = make(**arguments).timm_model(PIXELS)  # without a classifier
        torch.testing.assert_close(backbone(PIXELS), expected)


@needs_timm
def test_pools_of_ones_own(tmp_path):
    """`cls` of a model that pools the class token is timm's feature; `mean` that of the same model with avg."""
    token, average = save(tmp_path / "a"), save(tmp_path / "b", global_pool="avg")
    with torch.no_grad():
        torch.testing.assert_close(load_backbone(token, pool="cls")(PIXELS), load_backbone(token)(PIXELS))
        torch.testing.assert_close(load_backbone(average, pool="mean")(PIXELS), load_backbone(average)(PIXELS))
    no_class = save(tmp_path / "c", global_pool="avg", class_token=False)
    with pytest.raises(BackboneError, match="no class token"):
        load_backbone(no_class, pool="cls")


@needs_timm
def test_every_projection_is_converted_and_learns(tmp_path):
    detector = Detector(load_backbone(save(tmp_path), local_files_only=True))
    config = MethodConfig(name="masm", targets="attention+mlp", masm=MasmOptions(num_subspaces=2, subspace_rank=2))
    before = detector.eval()(PIXELS)
    method = build_method("masm", detector, config, seed=0)
    layers = {name: m for name, m in detector.named_modules() if isinstance(m, MASMLinear)}
    kinds = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert sorted(layers) == sorted(f"backbone.model.timm_model.blocks.{i}.{kind}" for i in (0, 1) for kind in kinds)
    for implementation in ("eager", "sdpa"):
        detector.backbone.set_attention(implementation)
        fused = {m.fused_attn for m in detector.modules() if hasattr(m, "fused_attn")}
        assert fused == {implementation == "sdpa"}
    loss = detector(PIXELS).square().sum()
    assert before.shape == (2,)
    loss.backward()
    assert all(layer.u.grad.abs().sum() + layer.v.grad.abs().sum() > 0 for layer in layers.values())
    frozen = [p for n, p in detector.named_parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)
    method.optimizer.step()


@needs_timm
def test_other_image_size(tmp_path):
    backbone = load_backbone(save(tmp_path), image_size=48)
    assert backbone(torch.zeros(1, 3, 48, 48)).shape == (1, 32)
    with pytest.raises(BackboneError, match="multiple of the patch size 8"):
        load_backbone(f"hf-hub:{tmp_path}", image_size=44)


@needs_timm
def test_checkpoint_of_timm_itself(tmp_path):
    """As timm writes it: names without a prefix, a classifier, `num_classes` among the arguments, pixel statistics."""
    import timm
    from timm.models import save_for_hf

    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **SMALL).eval()
    save_for_hf(model, tmp_path, model_args=SMALL | {"num_classes": 5}, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(str(tmp_path), local_files_only=True)
    assert (backbone.mean, backbone.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    with torch.no_grad():
        torch.testing.assert_close(
            backbone(PIXELS), model.forward_head(model.forward_features(PIXELS), pre_logits=True)
        )


@needs_timm
def test_refused_architectures(tmp_path):
    config = transformers.TimmWrapperConfig(architecture="resnet18")
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path / "resnet")
    with pytest.raises(BackboneError, match=r"'resnet18' has no patch embedding.*vision transformers"):
        load_backbone(str(tmp_path / "resnet"))
    save(tmp_path / "renamed")
    config = json.loads((tmp_path / "renamed" / "config.json").read_text())
    (tmp_path / "renamed" / "config.json").write_text(json.dumps(config | {"architecture": "vit_of_tomorrow"}))
    with pytest.raises(BackboneError, match=r"cannot build 'vit_of_tomorrow'.*upgrade timm"):
        load_backbone(str(tmp_path / "renamed"))


@needs_timm
def test_layer_that_is_read_and_not_called(tmp_path, monkeypatch):
    """BEiT reads the weight of its projection if it has a bias of its own: a replaced layer would never be used."""
    name = save(tmp_path, architecture="beit_base_patch16_224")
    assert load_backbone(name)(PIXELS).shape == (2, 32)  # it is set to call the projection
    complete = timm_wrapper.complete_config

    def without_calls(model):
        complete(model)
        for module in model.modules():
            if hasattr(module, "qkv_bias_separate"):
                module.qkv_bias_separate = False

    monkeypatch.setattr(timm_wrapper, "complete_config", without_calls)
    with pytest.raises(BackboneError, match=r"does not call 2 of its linear layers, e.g. .*attn\.qkv"):
        load_backbone(name)


@pytest.mark.skipif(HAS_TIMM, reason="timm is installed")
def test_without_timm_the_extra_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "timm_wrapper", "architecture": "resnet18"}))
    with pytest.raises(BackboneError, match=r"needs the extra timm"):
        load_backbone(str(tmp_path))


def test_open_clip_needs_its_prefix(tmp_path):
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {"embed_dim": 16}}')
    with pytest.raises(BackboneError, match=r"is an open_clip checkpoint: write open_clip:/.* as the name"):
        load_backbone(str(tmp_path), local_files_only=True)
