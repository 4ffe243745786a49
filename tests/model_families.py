"""Small random checkpoints of the families of vision transformers, as their own libraries save them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

#: Sizes that all families share: two blocks, 32 px.
SIZE, PATCH, WIDTH = 32, 8, 32
BLOCKS = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
INPUT = {"image_size": SIZE, "patch_size": PATCH}
TEXT = {**BLOCKS, "intermediate_size": 48, "vocab_size": 40, "eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 0}


def _transformers(kind: str) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        import transformers as t

        def clip(**vision):
            config = t.CLIPVisionConfig(**BLOCKS | INPUT | {"intermediate_size": 4 * WIDTH} | vision)
            return t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=config.to_dict()))

        siglip = {**BLOCKS, **INPUT, "intermediate_size": 48}
        model = {
            # L/14 has the quick GELU of OpenAI; H/14 of LAION has GELU, and heads of 80
            "clip-l14": lambda: clip(hidden_act="quick_gelu"),
            "clip-h14": lambda: clip(hidden_act="gelu", hidden_size=80, num_attention_heads=1, projection_dim=24),
            "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**BLOCKS, **INPUT, mlp_ratio=2)),
            "dinov3": lambda: t.DINOv3ViTModel(
                t.DINOv3ViTConfig(**BLOCKS, **INPUT, intermediate_size=48, num_register_tokens=3)
            ),
            "dinov3-gated": lambda: t.DINOv3ViTModel(
                t.DINOv3ViTConfig(**BLOCKS, **INPUT, intermediate_size=48, num_register_tokens=3, use_gated_mlp=True)
            ),
            # the checkpoints of SigLIP 2 with a fixed size are SigLIP models
            "siglip2": lambda: t.SiglipModel(t.SiglipConfig(text_config=TEXT, vision_config=siglip)),
            "siglip2-naflex": lambda: t.Siglip2VisionModel(
                t.Siglip2VisionConfig(
                    **BLOCKS, intermediate_size=48, patch_size=PATCH, num_patches=(SIZE // PATCH) ** 2
                )
            ),
        }[kind]()
        scramble(model).save_pretrained(folder)
        return str(folder)

    return save


def _timm(architecture: str, **arguments) -> Callable[[Path], str]:
    def save(folder: Path) -> str:
        import timm
        from timm.models import save_for_hf

        sizes = {"depth": 2, "embed_dim": WIDTH, "num_heads": 2, "img_size": SIZE, "patch_size": PATCH} | arguments
        model = scramble(timm.create_model(architecture, **sizes))
        save_for_hf(model, folder, model_args=sizes, safe_serialization=True)
        return str(folder)

    return save


def _open_clip(folder: Path) -> str:
    model, config = open_clip_model()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return f"open_clip:{folder}"


def open_clip_model(**vision):
    """A small `open_clip.CLIP` with random weights, and its configuration."""
    import open_clip

    config = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"layers": 2, "width": WIDTH, "head_width": 16, **INPUT, **vision},
        "text_cfg": {"context_length": 8, "vocab_size": 40, "width": 16, "heads": 2, "layers": 1},
    }
    return scramble(open_clip.CLIP(**config)), config


#: Name of a family -> the package it needs, and a function that saves a checkpoint to a folder and returns its name.
FAMILIES: dict[str, tuple[str, Callable[[Path], str]]] = {
    **{
        kind: ("transformers", _transformers(kind))
        for kind in ("clip-l14", "clip-h14", "dinov2", "dinov3", "dinov3-gated", "siglip2", "siglip2-naflex")
    },
    "timm-vit": ("timm", _timm("vit_base_patch16_224")),
    "perception-encoder": (
        "timm",
        _timm("vit_pe_core_base_patch16_224", ref_feat_shape=(4, 4), attn_pool_num_heads=2),
    ),
    # the tiny and small EVA-02 have a fused projection with a bias of its own, base and large have three projections
    "eva02-fused": ("timm", _timm("eva02_tiny_patch14_224", ref_feat_shape=(4, 4))),
    "eva02-split": ("timm", _timm("eva02_base_patch14_224", ref_feat_shape=(4, 4))),
    "open_clip": ("open_clip", _open_clip),
}
#: Name of a family -> linear layers of a block: of the attention, of the MLP.
LAYERS = {name: (4, 2) for name in FAMILIES} | {
    "dinov3-gated": (4, 3),
    "timm-vit": (2, 2),
    "perception-encoder": (2, 2),
    "eva02-fused": (2, 2),
    "eva02-split": (4, 3),
}


def saved(family: str, folder: Path) -> str:
    """The name of a backbone of `family`, saved to `folder`; skips the test where its package is missing."""
    package, save = FAMILIES[family]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed (the extra {package})")
    return save(folder)


@torch.no_grad()
def scramble(model):
    """Random values in every parameter: norms, biases and position embeddings would start as ones and zeros."""
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()
