"""LoRA: a trained product of rank r beside each frozen layer, alpha = 2 r, no dropout.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022; the layers are those of Hugging Face
PEFT.
"""

from __future__ import annotations

from torch import nn

from masm_detect.config import MethodConfig

from .method import MethodSpec, Rates
from .peft_layers import inject, peft


class Lora(MethodSpec):
    """Trains the LoRA factors of the target layers, and the head."""

    rates = Rates(lr=5e-4, head_lr=1e-3, rank=8)

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        settings = {"r": config.rank, "lora_alpha": 2 * config.rank, "lora_dropout": 0.0}
        inject(model, peft().LoraConfig(**settings, target_modules=names))
