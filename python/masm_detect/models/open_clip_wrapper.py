"""Image towers of open_clip, whose attention is rebuilt from linear layers that a method can replace.

The name of a backbone is "open_clip:" and a folder or hub id with `open_clip_config.json` and
`open_clip_model.safetensors` ("open_clip:laion/CLIP-ViT-L-14-laion2B-s32B-b82K"). open_clip keeps query, key and value
in one raw parameter of `nn.MultiheadAttention`; here they are three `nn.Linear`, as in CLIP of transformers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from masm_detect.errors import BackboneError
from masm_detect.results import read_json

MODEL_TYPE = "open_clip"
PREFIX = "open_clip:"
CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"

NEEDS_OPEN_CLIP = (
    "a model of open_clip needs the extra open_clip (pip install 'masm_ext[open_clip]'), and a torchvision that was "
    "built for this torch: install it from the index that torch came from"
)
#: Settings of open_clip's blocks that change the attention that is rebuilt here.
_CUSTOM_BLOCKS = ("qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn_inner", "scale_attn", "scale_fc")


@dataclass
class OpenClipConfig:
    """What a tower is built from.

    Attributes:
        model_cfg: "model_cfg" of open_clip_config.json, without the text tower; the image size is that of the tower
        preprocess_cfg: "preprocess_cfg" of the same file
    """

    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    model_type: str = MODEL_TYPE

    @property
    def hidden_size(self) -> int:
        """Width of a token."""
        return self.model_cfg["vision_cfg"]["width"]

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self.model_cfg["vision_cfg"]["patch_size"]

    @property
    def image_size(self) -> int | list[int]:
        """Side of the input in pixels."""
        return self.model_cfg["vision_cfg"]["image_size"]

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; `build_tower` takes them."""
        return {"model_type": self.model_type, "model_cfg": self.model_cfg, "preprocess_cfg": self.preprocess_cfg}


class Attention(nn.Module):
    """`nn.MultiheadAttention` of a query with itself, as four linear layers; called as open_clip calls it."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.num_heads, self.fused = heads, True
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, query: Tensor, *_: Any, attn_mask: Tensor | None = None, **__: Any) -> tuple[Tensor, None]:
        """query [B, T, width] -> (output [B, T, width], None); key and value are computed from the query."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (layer(query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for layer in projections)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask)  # [B, heads, T, width / heads]
        else:
            weights = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # [B, heads, T, T]
            mixed = (weights if attn_mask is None else weights + attn_mask).softmax(-1) @ v
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None


class OpenClipVisionModel(nn.Module):
    """An image tower of open_clip without its projection to the space of the texts.

    Attributes:
        config: what it is built from
        visual: open_clip's `VisionTransformer`, with `Attention` in place of `nn.MultiheadAttention`
    """

    def __init__(self, config: OpenClipConfig):
        super().__init__()
        self.config = config
        self.visual = _new_tower(config)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.visual.conv1.weight.dtype

    def forward(self, pixel_values: Tensor) -> Any:
        """pixel_values [B, 3, size, size] -> `pooler_output` [B, width], `last_hidden_state` [B, 1 + patches, width].

        Both are behind the final norm; the pooled feature is open_clip's own.
        """
        tokens = self.visual.transformer(self.visual._embeds(pixel_values))
        pooled, _ = self.visual._pool(tokens)
        return SimpleNamespace(last_hidden_state=self.visual.ln_post(tokens), pooler_output=pooled)


def build_tower(config: dict[str, Any]) -> OpenClipVisionModel:
    """A tower with random weights, from `OpenClipConfig.to_dict`.

    Raises:
        BackboneError: open_clip is missing, or the tower is none that can be read.
    """
    return OpenClipVisionModel(OpenClipConfig(config["model_cfg"], config["preprocess_cfg"]))


def load_tower(
    name: str, image_size: int | None, dtype: torch.dtype, file_of: Callable[[str], str | None]
) -> OpenClipVisionModel:
    """The tower of a checkpoint.

    Args:
        name: folder or hub id, for messages.
        image_size: input side in pixels; position embeddings are interpolated as open_clip does; None = the model's.
        dtype: of the weights.
        file_of: path of a file of the checkpoint by its name; None if there is none.

    Raises:
        BackboneError: the checkpoint is not complete, not in safetensors, or its tower cannot be read.
    """
    path, weights = file_of(CONFIG), file_of(WEIGHTS)
    if path is None or weights is None:
        raise BackboneError(
            f"{name!r} is no open_clip checkpoint with {CONFIG} and {WEIGHTS} (pickled weights, .bin and .pt, are not "
            "read): give a folder or hub id that has both"
        )
    content = read_json(path)
    kept = {key: value for key, value in content["model_cfg"].items() if key in ("embed_dim", "quick_gelu")}
    # patches are dropped at random in pretraining only
    vision = {"image_size": 224} | content["model_cfg"]["vision_cfg"] | {"patch_dropout": 0.0}
    if image_size is not None:
        vision["image_size"] = image_size
    config = OpenClipConfig(kept | {"vision_cfg": vision}, content.get("preprocess_cfg") or {})
    model = OpenClipVisionModel(config)
    state = _split_projections(_visual_state(weights))
    _resize_positions(state, model)
    # features in front of it are used, so a checkpoint of the image tower alone need not have it
    state.pop("proj", None)
    try:
        model.visual.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise BackboneError(f"the checkpoint {name!r} does not fill its open_clip tower: {error}") from error
    return model.to(dtype).eval()


def pixel_statistics(config: OpenClipConfig) -> tuple[Any, Any]:
    """Mean and std (RGB, for pixels in [0, 1]) of the checkpoint, else those of OpenAI's CLIP."""
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    settings = config.preprocess_cfg
    return settings.get("mean") or OPENAI_DATASET_MEAN, settings.get("std") or OPENAI_DATASET_STD


def resolve_pool(model: OpenClipVisionModel, pool: str) -> str:
    """How the feature is pooled: "pooler" is open_clip's own pooling, and what "auto" means.

    Raises:
        BackboneError: "cls" or "mean" of a model that has an attention pool, or norms behind the pooling.
    """
    visual = model.visual
    if pool in ("auto", "pooler"):
        return "pooler"
    if visual.attn_pool is not None or visual.final_ln_after_pool:
        raise BackboneError(f'this open_clip model has its own pooling: pool must be "auto", got {pool!r}')
    return pool


def set_attention(model: OpenClipVisionModel, implementation: str) -> None:
    """Choose "sdpa" or "eager" attention."""
    for module in model.modules():
        if isinstance(module, Attention):
            module.fused = implementation == "sdpa"


def _new_tower(config: OpenClipConfig) -> nn.Module:
    try:
        from open_clip.model import _build_vision_tower
        from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another build
        raise BackboneError(f"{NEEDS_OPEN_CLIP} ({error})") from error
    settings = config.model_cfg
    vision = settings["vision_cfg"]
    if vision.get("timm_model_name"):
        raise BackboneError(
            f"this open_clip model is a tower of timm ({vision['timm_model_name']}): use the same weights as a model "
            "of timm"
        )
    custom = [key for key in _CUSTOM_BLOCKS if vision.get(key)]
    if custom or vision.get("block_type") not in (None, "default"):
        raise BackboneError(
            f"this open_clip model has blocks of its own ({', '.join(custom) or vision['block_type']}), which are not "
            "read: only plain vision transformers are"
        )
    tower = _build_vision_tower(settings["embed_dim"], dict(vision), settings.get("quick_gelu", False))
    if not isinstance(tower, VisionTransformer):
        raise BackboneError(f"this open_clip model is a {type(tower).__name__}: only vision transformers are read")
    for block in tower.transformer.resblocks:
        if not isinstance(block, ResidualAttentionBlock):
            raise BackboneError(f"this open_clip model has blocks of type {type(block).__name__}, which are not read")
        block.attn = Attention(block.attn.embed_dim, block.attn.num_heads)
    tower.proj = None
    return tower


def _visual_state(path: str) -> dict[str, Tensor]:
    """The tensors of the image tower in a checkpoint, without their prefix."""
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("visual.")]  # noqa: SIM118 (not a dict)
            return {name.removeprefix("visual."): file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot load {path} as safetensors (damaged?): {error}") from error


def _split_projections(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rows of every `in_proj` of a block as query, key and value."""
    split = {}
    for name, tensor in state.items():
        stem, found, kind = name.partition("in_proj_")
        if found and stem.startswith("transformer."):
            for letter, part in zip("qkv", tensor.chunk(3)):
                split[f"{stem}{letter}_proj.{kind}"] = part.clone()
        else:
            split[name] = tensor
    return split


def _resize_positions(state: dict[str, Tensor], model: OpenClipVisionModel) -> None:
    """Interpolate the position embeddings in `state` to the grid of `model`, as open_clip does."""
    from open_clip.model import resize_pos_embed

    key = "visual.positional_embedding"
    named = {key: state["positional_embedding"]} if "positional_embedding" in state else {}
    resize_pos_embed(named, model)
    state.update({name.removeprefix("visual."): tensor for name, tensor in named.items()})
