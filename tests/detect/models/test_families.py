"""Every family of vision transformers: its layers are found, converted, trained, saved, loaded and merged."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from masm_detect.config import MethodConfig
from masm_detect.models.backbone import BackboneError, load_backbone
from masm_detect.models.description import build, describe
from masm_detect.models.detector import Detector
from model_families import FAMILIES, LAYERS, SIZE, open_clip_model, saved
from torch.nn import functional as F

from masm_ext import MaskedAdamW, MASMConfig, MASMLinear, convert, load_adapter, merge, save_adapter, scale_free_groups

needs_open_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="open_clip is not installed (the extra open_clip)"
)


def detector_on(name: str) -> Detector:
    torch.manual_seed(3)  # of the head
    return Detector(load_backbone(name, local_files_only=True)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_convert_train_save_load_merge(family, tmp_path, seed):
    name = saved(family, tmp_path)
    detector, pixels = detector_on(name), torch.randn(4, 3, SIZE, SIZE)
    plain = detector(pixels)
    backbone = detector.backbone
    assert MethodConfig().targets == "attention"
    convert(
        detector,
        MASMConfig(
            num_subspaces=2,
            subspace_rank=2,
            target_modules=backbone.attention_targets,
            modules_to_save=("head",),
        ),
        use_cache=False,
        progress=False,
    )
    layers = {n: m for n, m in detector.named_modules() if isinstance(m, MASMLinear)}
    attention, mlp = LAYERS[family]
    assert len(layers) == 2 * attention and len(backbone.linear_names("mlp")) == 2 * mlp
    torch.testing.assert_close(detector(pixels), plain, rtol=0, atol=2e-4)

    optimizer = MaskedAdamW(scale_free_groups(detector, 0.05))
    before = {n: p.detach().clone() for n, p in detector.named_parameters()}
    F.binary_cross_entropy_with_logits(detector(pixels), torch.tensor([0.0, 1, 0, 1])).backward()
    optimizer.step()
    # every converted layer is called: a layer that the model reads without calling would have no gradient
    assert all(layer.u.grad.abs().sum() + layer.v.grad.abs().sum() > 0 for layer in layers.values())
    moved = {n.rpartition(".")[0] for n, p in detector.named_parameters() if not torch.equal(p, before[n])}
    assert moved - {"head"} and moved <= set(layers) | {"head"}
    with torch.no_grad():
        trained = detector(pixels)
    assert (trained - plain).abs().max() > 1e-3

    save_adapter(detector, tmp_path / "adapter")
    loaded = detector_on(name)
    load_adapter(loaded, tmp_path / "adapter")
    state, expected = loaded.state_dict(), detector.state_dict()
    assert state.keys() == expected.keys()
    # the extra state counts the steps of an optimizer, which an adapter does not hold
    assert all(torch.equal(state[key], value) for key, value in expected.items() if not key.endswith("_extra_state"))
    assert all(loaded.get_submodule(n).base_hash == layer.base_hash for n, layer in layers.items())
    with torch.no_grad():
        assert torch.equal(loaded.eval()(pixels), trained)
        merge(loaded, keep=False)
        torch.testing.assert_close(loaded(pixels), trained, rtol=0, atol=2e-4)
    assert not any(isinstance(module, MASMLinear) for module in loaded.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_rebuilt_from_its_description(family, tmp_path, seed):
    """The description and the weights are the backbone, for each pooling that the family has."""
    name = saved(family, tmp_path)
    pixels = torch.randn(2, 3, SIZE, SIZE)
    pools = []
    for pool in ("auto", "cls", "mean"):
        try:
            backbone = load_backbone(name, pool=pool, local_files_only=True)
        except BackboneError as error:
            assert pool == "cls" and "no class token" in str(error)
            continue
        pools.append(pool)
        described = describe(backbone)
        assert str(tmp_path) not in str(described)
        again = build(described)
        again.model.load_state_dict(backbone.model.state_dict(), strict=True)
        assert (again.mean, again.std, again.pool) == (tuple(backbone.mean), tuple(backbone.std), backbone.pool)
        with torch.no_grad():
            assert torch.equal(again(pixels), backbone(pixels))
    assert {"auto", "mean"} <= set(pools)


@pytest.mark.parametrize("family", FAMILIES)
def test_larger_images(family, tmp_path, seed):
    """The positions are interpolated or rotary: a larger image gives another feature, not an error."""
    name = saved(family, tmp_path)
    backbone = load_backbone(name, image_size=48, local_files_only=True)
    pixels = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        feature = backbone(pixels)
        backbone.set_attention("eager")
        torch.testing.assert_close(backbone(pixels), feature, rtol=1e-3, atol=1e-4)
    assert feature.shape == (2, backbone.feature_dim)


def test_siglip2_patches_are_those_of_its_image_processor(tmp_path, seed):
    """The same picture through transformers' own NaFlex processor and model."""
    import numpy as np
    import transformers

    backbone = load_backbone(saved("siglip2-naflex", tmp_path), local_files_only=True)
    image = torch.randint(0, 256, (SIZE, SIZE, 3), dtype=torch.uint8)
    siglip2 = transformers.models.siglip2
    if int(transformers.__version__.split(".")[0]) >= 5:
        kind = siglip2.image_processing_pil_siglip2.Siglip2ImageProcessorPil
    else:
        kind = siglip2.image_processing_siglip2.Siglip2ImageProcessor
    processor = kind(patch_size=8, max_num_patches=16)
    with torch.no_grad():
        expected = backbone.model(**processor(np.asarray(image), return_tensors="pt")).pooler_output
        pixels = ((image.permute(2, 0, 1) / 255 - 0.5) / 0.5)[None]
        torch.testing.assert_close(backbone(pixels), expected, rtol=1e-4, atol=1e-5)


@needs_open_clip
@pytest.mark.parametrize("size", [SIZE, 48])
def test_open_clip_feature_is_that_of_open_clip(tmp_path, seed, size):
    """With nn.MultiheadAttention and open_clip's own resizing of positions; the projection comes after the feature."""
    from open_clip.model import resize_pos_embed
    from safetensors.torch import load_file

    backbone = load_backbone(saved("open_clip", tmp_path), image_size=size, local_files_only=True)
    model, _ = open_clip_model(image_size=size)
    state = load_file(tmp_path / "open_clip_model.safetensors")
    resize_pos_embed(state, model)
    model.load_state_dict(state)
    pixels = torch.randn(3, 3, size, size)
    with torch.no_grad():
        expected = model.eval().encode_image(pixels)
        projected = backbone(pixels) @ model.visual.proj
    torch.testing.assert_close(projected, expected, rtol=1e-4, atol=1e-5)
    model.visual.output_tokens = True
    for pool in ("cls", "mean"):
        backbone = load_backbone(f"open_clip:{tmp_path}", image_size=size, pool=pool, local_files_only=True)
        with torch.no_grad():
            _, tokens = model.visual(pixels)  # of the patches, behind the final norm
            feature = backbone(pixels)
        if pool == "mean":
            torch.testing.assert_close(feature, tokens.mean(1), rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(feature @ model.visual.proj, expected, rtol=1e-4, atol=1e-5)
    assert backbone.mean == (0.1, 0.2, 0.3) and backbone.std == (0.4, 0.5, 0.6)


@needs_open_clip
def test_open_clip_towers_that_are_not_read(tmp_path, seed):
    import json

    from safetensors.torch import save_file

    def save(**vision) -> str:
        config = {
            "embed_dim": 16,
            "vision_cfg": {"layers": 2, "width": 32, "head_width": 16, "image_size": 32} | vision,
        }
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        save_file({"visual.proj": torch.zeros(1)}, tmp_path / "open_clip_model.safetensors")
        return f"open_clip:{tmp_path}"

    for vision, message in (
        ({"qk_norm": True, "patch_size": 8}, "blocks of its own .qk_norm."),
        ({"timm_model_name": "vit_tiny_patch16_224"}, "tower of timm .vit_tiny_patch16_224."),
        ({"layers": [1, 1, 1, 1]}, "ModifiedResNet: only vision transformers"),
        ({"patch_size": 8}, "does not fill its open_clip tower"),
    ):
        with pytest.raises(BackboneError, match=message):
            load_backbone(save(**vision), local_files_only=True)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(BackboneError, match="pickled weights"):
        load_backbone(f"open_clip:{tmp_path}", local_files_only=True)
