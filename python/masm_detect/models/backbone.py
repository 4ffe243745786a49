"""Pretrained vision transformers behind one small interface: pixels in, one pooled feature per image out."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masm_detect.errors import BackboneError as BackboneError
from masm_detect.models import naflex, open_clip_wrapper, timm_wrapper
from masm_detect.models.bundled import load_bundled_dinov2
from masm_detect.models.pretrained import load_pretrained, pixel_statistics

BUNDLED = "bundled:dinov2-small"
POOLS = ("auto", "cls", "mean", "pooler")

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)

# Pixel statistics of the families, for checkpoints without preprocessor_config.json.
_PIXEL_STATISTICS = {
    "clip_vision_model": (CLIP_MEAN, CLIP_STD),
    "siglip_vision_model": (HALF, HALF),
    naflex.MODEL_TYPE: (HALF, HALF),
    "vit": (HALF, HALF),
}

# Names of the linear layers of a block, in transformers 4 and 5, timm and open_clip. A layer number in front is
# required: SigLIP's pooling head has an `attention.out_proj` too, which nn.MultiheadAttention reads as a raw weight, so
# it must stay a Linear.
_BLOCK = r"(?:^|\.)(?:layers?|(?:res)?blocks?)\.\d+\."
_ATTENTION = re.compile(
    _BLOCK + r"(?:self_attn|attention|attn)\.(?:attention\.)?"
    r"(?:q_proj|k_proj|v_proj|out_proj|o_proj|query|key|value|qkv|proj|output\.dense)$"
)
_MLP = re.compile(
    _BLOCK
    + r"(?:mlp\.(?:fc1|fc1_g|fc1_x|fc2|c_fc|c_proj|weights_in|weights_out|gate_proj|up_proj|down_proj)"
    + r"|intermediate\.dense|output\.dense)$"
)


class Backbone(nn.Module):
    """A Hugging Face vision model with its input size, pixel statistics, pooling and layer names.

    Attributes:
        model: the Hugging Face module. feature_dim: width of the pooled feature. image_size: input side in pixels.
        mean, std: pixel statistics (RGB, for pixels in [0, 1]). pool: how the feature is pooled (never "auto").
        attention_targets, mlp_targets: ``target_modules`` patterns ("re:...") for query, key, value, output and for
        the MLP.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | None = None,
        pool: str = "auto",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ):
        super().__init__()
        config = model.config
        self.model = model
        self.model_type: str = config.model_type
        if self._is_timm:
            timm_wrapper.complete_config(model)
        self.feature_dim: int = config.hidden_size
        self.patch_size: int = _square(getattr(config, "patch_size", None), "patch_size")
        is_naflex = self.model_type == naflex.MODEL_TYPE
        pretrained_size = naflex.natural_size(config) if is_naflex else _square(config.image_size, "image_size")
        # DINOv2 was trained at 518 px at the end, but its own preprocessing crops 224 px, the default here.
        natural = 224 if self.model_type.startswith("dinov2") and pretrained_size == 518 else pretrained_size
        self.image_size: int = natural if image_size is None else int(image_size)
        if self.image_size < self.patch_size or self.image_size % self.patch_size:
            raise BackboneError(
                f"image_size must be a multiple of the patch size {self.patch_size}, got {self.image_size}"
            )
        self._interpolate = self._position_arguments(pretrained_size)

        if self._is_timm:
            default_mean, default_std = timm_wrapper.pixel_statistics(model)
        elif self._is_open_clip:
            default_mean, default_std = open_clip_wrapper.pixel_statistics(config)
        else:
            default_mean, default_std = _PIXEL_STATISTICS.get(self.model_type, (IMAGENET_MEAN, IMAGENET_STD))
        self.mean, self.std = tuple(mean or default_mean), tuple(std or default_std)
        self.pool = self._resolve_pool(pool)
        self.attention_targets = _patterns(self.linear_names("attention"))
        self.mlp_targets = _patterns(self.linear_names("mlp"))
        if not self.attention_targets:
            raise BackboneError(
                f"no attention projections found in a {type(model).__name__}: not a known vision transformer"
            )

    def set_attention(self, implementation: str) -> None:
        """Choose how attention is computed: "sdpa" (fused) or "eager". The result is the same up to rounding."""
        if self._is_timm:
            timm_wrapper.set_attention(self.model, implementation)
        elif self._is_open_clip:
            open_clip_wrapper.set_attention(self.model, implementation)
        else:
            self.model.set_attn_implementation(implementation)

    def linear_names(self, kind: str) -> list[str]:
        """Exact names, inside ``model``, of the linear layers of ``kind`` "attention" or "mlp" (for PEFT)."""
        if kind not in ("attention", "mlp"):
            raise ValueError(f'kind must be "attention" or "mlp", got {kind!r}')
        pattern, names = (_ATTENTION if kind == "attention" else _MLP), []
        for name, module in self.model.named_modules():
            name = name.removesuffix(".base_layer")  # PEFT wraps the layer it adapts
            if isinstance(module, nn.Linear) and pattern.search(name):
                # transformers 4: `attention.output.dense` belongs to the attention, `output.dense` to the MLP.
                if kind == "mlp" and _ATTENTION.search(name):
                    continue
                names.append(name)
        return names

    def forward(self, pixel_values: Tensor) -> Tensor:
        """pixel_values [B, 3, image_size, image_size], normalised -> features [B, feature_dim]."""
        expected = (3, self.image_size, self.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"expected pixel_values of shape [B, {', '.join(map(str, expected))}], got {list(pixel_values.shape)}"
            )
        if self.model_type == naflex.MODEL_TYPE:
            output = self.model(**naflex.inputs_of(pixel_values, self.patch_size))
        else:
            output = self.model(pixel_values=pixel_values, **self._interpolate)
        if self.pool == "pooler":
            return output.pooler_output
        tokens = output.last_hidden_state  # [B, prefix + patches, feature_dim]
        if self.model_type == "clip_vision_model":
            # CLIP applies its final norm to the class token only, inside the pooler.
            tokens = getattr(self.model, "vision_model", self.model).post_layernorm(tokens)
        feature = tokens[:, 0] if self.pool == "cls" else tokens[:, -self._num_patches :].mean(dim=1)
        # Some models of timm apply their final norm behind the pooling.
        return self.model.timm_model.fc_norm(feature) if self._is_timm else feature

    @property
    def _is_timm(self) -> bool:
        return self.model_type == timm_wrapper.MODEL_TYPE

    @property
    def _is_open_clip(self) -> bool:
        return self.model_type == open_clip_wrapper.MODEL_TYPE

    @property
    def _num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    def _resolve_pool(self, pool: str) -> str:
        if pool not in POOLS:
            raise BackboneError(f"pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if self._is_timm:
            return timm_wrapper.resolve_pool(self.model, pool)
        if self._is_open_clip:
            return open_clip_wrapper.resolve_pool(self.model, pool)
        siglip = self.model_type.startswith("siglip")
        if siglip and pool == "cls":
            raise BackboneError('SigLIP has no class token: pool must be "auto", "pooler" or "mean"')
        if pool != "auto":
            if pool == "pooler" and self.model_type == "vit":
                raise BackboneError('ViT checkpoints hold no pretrained pooler: pool must be "auto", "cls" or "mean"')
            return pool
        if siglip:
            head = getattr(getattr(self.model, "vision_model", self.model), "head", None)
            return "pooler" if head is not None else "mean"
        # The class token after the final norm: what CLIP and DINOv2 call pooler_output.
        inner = getattr(
            self.model, "embeddings", getattr(getattr(self.model, "vision_model", None), "embeddings", None)
        )
        has_class_token = any(hasattr(inner, name) for name in ("cls_token", "class_embedding"))
        return "cls" if has_class_token else "mean"

    def _position_arguments(self, pretrained_size: int) -> dict[str, bool]:
        interpolates = self._is_timm or self.model_type == naflex.MODEL_TYPE or self.model_type.startswith("dinov")
        if self.image_size == pretrained_size or interpolates:
            return {}  # DINOv3 has rotary positions
        if "interpolate_pos_encoding" not in inspect.signature(self.model.forward).parameters:
            raise BackboneError(
                f"{type(self.model).__name__} takes {pretrained_size} px only (it cannot interpolate its positions); "
                f"leave image_size unset, got {self.image_size}"
            )
        return {"interpolate_pos_encoding": True}


def load_backbone(name: str, *, image_size: int | None = None, pool: str = "auto", dtype: torch.dtype | None = None,
                  local_files_only: bool = False, cache_dir: str | Path | None = None) -> Backbone:  # fmt: skip
    """Load a pretrained vision transformer.

    Args:
        name: "bundled:dinov2-small", a local folder in Hugging Face layout, or a hub id such as
            "openai/clip-vit-large-patch14". The vision tower of a text and image model (CLIP, SigLIP) is loaded.
            Vision transformers of timm are loaded with the extra timm; "open_clip:" and a folder or hub id loads one
            of open_clip, with the extra open_clip.
        image_size: input side in pixels, a multiple of the patch size; None = the model's own (224 for DINOv2).
        pool: "auto" (class token after the final norm; SigLIP's pooling head; timm's own pooling; else the mean),
            "cls", "mean", "pooler".
        dtype: of the weights; None = float32.
        cache_dir: where converted bundled weights or downloaded files are kept; None = the default cache.

    Raises:
        BackboneError: unknown name, a checkpoint with missing weights, a size or pool that the model does not have, a
            target layer that the model does not call.
    """
    if name.startswith("bundled:"):
        if name != BUNDLED:
            raise BackboneError(f"the only bundled model is {BUNDLED}, got {name!r}")
        model = load_bundled_dinov2(cache_dir)
        return Backbone(
            model.to(dtype) if dtype else model,
            image_size=image_size,
            pool=pool,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
        )
    name = re.sub(r"^(open_clip:)?hf[-_]hub:", r"\1", name)  # as timm and open_clip write a hub id
    model = load_pretrained(name, image_size, dtype or torch.float32, local_files_only, cache_dir)
    mean, std = pixel_statistics(name, local_files_only, cache_dir)
    backbone = Backbone(model, image_size=image_size, pool=pool, mean=mean, std=std)
    _check_features(backbone, name)
    return backbone


def _check_features(backbone: Backbone, name: str) -> None:
    """Raise BackboneError unless one image gives one feature vector, the same one twice, through the target layers."""
    kind, side = type(backbone.model).__name__, backbone.image_size
    image = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0)).to(backbone.model.dtype)
    names = backbone.linear_names("attention") + backbone.linear_names("mlp")
    unused = dict.fromkeys(names)
    hooks = [backbone.model.get_submodule(n).register_forward_hook(_discards(unused, n)) for n in names]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first, second = backbone(image), backbone(image)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, AssertionError) as error:
        raise BackboneError(f"{name!r} ({kind}) cannot take an image of {side} x {side} pixels: {error}") from error
    finally:
        for hook in hooks:
            hook.remove()
    if first.shape != (1, backbone.feature_dim):
        raise BackboneError(
            f"{name!r} ({kind}) gives features of shape {list(first.shape)} for one image, not "
            f"[1, {backbone.feature_dim}]: not a known vision transformer"
        )
    if not torch.equal(first, second):
        raise BackboneError(
            f"{name!r} ({kind}) gives other features for the same image each time, in eval mode too, as a masked "
            "autoencoder does: a detector on it would have no fixed score. Use a checkpoint without masking"
        )
    if unused:
        raise BackboneError(
            f"{name!r} ({kind}) does not call {len(unused)} of its linear layers, e.g. {next(iter(unused))}: it reads "
            "their weights, so that a method which replaces them would train nothing. Use the same model in another "
            "format, e.g. that of transformers for BEiT or DINOv3"
        )


def _discards(names: dict[str, None], name: str) -> Callable[..., None]:
    """A forward hook that removes `name` from `names`."""

    def hook(*_: Any) -> None:
        names.pop(name, None)

    return hook


def _patterns(names: list[str]) -> tuple[str, ...]:
    """One "re:" pattern per kind of layer: the layer number becomes any number, with any prefix."""
    stems = dict.fromkeys(re.sub(r"\\\.\d+\\\.", lambda _: r"\.\d+\.", re.escape(name)) for name in names)
    return tuple(rf"re:(?:.*\.)?{stem}$" for stem in stems)


def _square(value, what: str) -> int:
    if isinstance(value, int):
        return value
    if isinstance(value, (tuple, list)) and len(value) == 2 and value[0] == value[1]:
        return int(value[0])
    raise BackboneError(f"the model's {what} must be one number or a square, got {value!r}")
