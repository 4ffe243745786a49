"""SigLIP 2 with NaFlex, which takes the patches of an image in place of its pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MODEL_TYPE = "siglip2_vision_model"


def natural_size(config: Any) -> int:
    """Side in pixels of a square image with the number of patches that the model was pretrained on."""
    return int(config.num_patches**0.5) * config.patch_size


def inputs_of(pixel_values: Tensor, patch_size: int) -> dict[str, Tensor]:
    """The arguments of `Siglip2VisionModel` for square images of one size; nothing is padded.

    Args:
        pixel_values: [B, 3, side, side], normalised, any floating dtype.
        patch_size: side of a patch in pixels, a divisor of `side`.

    Returns:
        `pixel_values` [B, patches, patch_size * patch_size * 3], `pixel_attention_mask` [B, patches] of ones,
        `spatial_shapes` [B, 2]: rows and columns of patches.
    """
    batch, side = len(pixel_values), pixel_values.shape[-1] // patch_size
    grid = pixel_values.unflatten(3, (side, patch_size)).unflatten(2, (side, patch_size))
    # [B, 3, rows, p, columns, p] -> [B, rows, columns, p, p, 3]: the order of transformers' image processor
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, side * side, -1)
    device = pixel_values.device
    return {
        "pixel_values": patches,
        "pixel_attention_mask": torch.ones(batch, side * side, dtype=torch.int32, device=device),
        "spatial_shapes": torch.full((batch, 2), side, device=device),
    }
