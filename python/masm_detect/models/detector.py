"""The detector: a pretrained backbone and a linear real/fake head."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from masm_detect.config import ModelConfig
from masm_detect.models.backbone import Backbone, load_backbone


class Detector(nn.Module):
    """``logits = head(backbone(pixels))``; label 1 = fake, P(fake) = sigmoid(logit)."""

    def __init__(self, backbone: Backbone):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(backbone.feature_dim, 1)

    def forward(self, pixel_values: Tensor, return_features: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """pixel_values [B, 3, image_size, image_size] -> logits [B], always float32.

        With `return_features`: (logits, features [B, feature_dim]).
        """
        features = self.backbone(pixel_values)  # [B, feature_dim]
        # A bf16 logit has 8 bits: ties would blur the AUC. The head is tiny, so it stays in float32 under autocast.
        with torch.autocast(device_type=features.device.type, enabled=False):
            logits = self.head(features.to(self.head.weight.dtype)).squeeze(-1).float()
        return (logits, features) if return_features else logits


def new_detector(config: ModelConfig) -> Detector:
    """A detector on the pretrained backbone that the configuration of a run names, with a new head."""
    return Detector(
        load_backbone(
            config.backbone,
            image_size=config.image_size,
            pool=config.pool,
            local_files_only=config.local_files_only,
        )
    )
