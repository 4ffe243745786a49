"""MiLoRA: LoRA whose two factors start as the last r singular directions of the weight, which leaves the others alone.

Source: Wang et al., "MiLoRA: Harnessing Minor Singular Components for Parameter-Efficient LLM Finetuning", NAACL 2025,
arXiv 2406.09044. The layers are those of Hugging Face PEFT, which has no such start of its own.
"""

from __future__ import annotations

import torch
from torch import nn

from masm_detect.config import MethodConfig

from .layers import check_rank
from .lora import Lora


class MiLora(Lora):
    """Trains LoRA factors that start as the last `rank` singular directions of the target layers, and the head."""

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        check_rank(model, names, config)
        super().adapt(model, names, config)
        for name in names:
            start_from_last_directions(model.get_submodule(name))


@torch.no_grad()
def start_from_last_directions(layer: nn.Module) -> None:
    """Set the factors A [r, D], B [N, r] of a PEFT LoRA layer to the last r singular directions of its weight [N, D],
    and take them out of the weight: the output stays the same up to rounding.
    """
    a, b, scaling = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    weight = layer.base_layer.weight
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    r = a.shape[0]
    root = (sigma[-r:] / scaling).sqrt()
    b.copy_(left[:, -r:] * root)
    a.copy_(root[:, None] * right[-r:])
    # the factors as rounded, so that the sum is the pretrained weight
    weight.copy_(weight.double() - scaling * (b.double() @ a.double()))
