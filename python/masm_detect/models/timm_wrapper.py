"""Models of timm, as transformers wraps them (`TimmWrapperModel`): what their configuration does not say.

A checkpoint is a folder or hub id of timm itself ("timm/vit_base_patch16_clip_224.openai"), or one that transformers
saved.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from masm_detect.errors import BackboneError

MODEL_TYPE = "timm_wrapper"

#: What to do where timm cannot be imported.
NEEDS_TIMM = (
    "a model of timm needs the extra timm (pip install 'masm_ext[timm]'), and a torchvision that was built for this "
    "torch: install it from the index that torch came from"
)


def prepare_config(config: Any, image_size: int | None) -> None:
    """Change the configuration so that the model is built without a classifier, for images of `image_size`.

    Position embeddings are interpolated in every forward pass if the size is not the pretrained one.
    """
    arguments = dict(config.model_args or {})
    arguments.pop("num_classes", None)  # timm writes it, transformers gives it a second time
    pretrained = (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    if image_size is not None and (pretrained is None or image_size != pretrained[-1]):
        arguments["dynamic_img_size"] = True
    config.model_args = arguments


def complete_config(model: nn.Module) -> None:
    """Set `hidden_size`, `patch_size` and `image_size` of the configuration from the model that it made.

    An attention with a bias beside its fused projection (EVA-02, BEiT) reads the weight of the projection, so that a
    layer in its place would train nothing; here it calls the projection and adds the bias.

    Raises:
        BackboneError: the model has no patches, such as a convolutional network.
    """
    inner = model.timm_model
    for module in inner.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    patches = getattr(inner, "patch_embed", None)
    sizes = [getattr(patches, key, None) for key in ("patch_size", "img_size")]
    if None in sizes:
        raise BackboneError(
            f"timm's {model.config.architecture!r} has no patch embedding of a known size: only vision transformers "
            "are read, such as timm/vit_base_patch16_clip_224.openai"
        )
    model.config.patch_size, model.config.image_size = sizes
    model.config.hidden_size = getattr(inner, "head_hidden_size", inner.num_features)


def pixel_statistics(model: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std (RGB, for pixels in [0, 1]) of the checkpoint, else those of its architecture in timm."""
    settings = getattr(model.config, "pretrained_cfg", None) or model.timm_model.pretrained_cfg
    return tuple(settings["mean"]), tuple(settings["std"])


def resolve_pool(model: nn.Module, pool: str) -> str:
    """How the feature is pooled: "pooler" is timm's own pooling of this model, and what "auto" means.

    Raises:
        BackboneError: the model has no class token, or no row of tokens to pool.
    """
    inner = model.timm_model
    if pool in ("auto", "pooler"):
        return "pooler"
    if not hasattr(inner, "num_prefix_tokens"):
        raise BackboneError(
            f'timm\'s {model.config.architecture!r} has no row of tokens: pool must be "auto", got {pool!r}'
        )
    if pool == "cls" and getattr(inner, "cls_token", None) is None:
        raise BackboneError(f'timm\'s {model.config.architecture!r} has no class token: pool must be "auto" or "mean"')
    return pool


def set_attention(model: nn.Module, implementation: str) -> None:
    """Choose "sdpa" or "eager" attention: transformers does not pass the choice on to timm."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = implementation == "sdpa"
