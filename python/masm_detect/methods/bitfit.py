"""BitFit: every bias of the backbone is trained, and the head.

Source: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
ACL 2022, arXiv 2106.10199.
"""

from __future__ import annotations

from torch import nn

from masm_detect.config import ConfigError, MethodConfig

from .method import MethodSpec, Rates


class BitFit(MethodSpec):
    """Trains all biases, and the head."""

    # decay would pull pretrained biases towards 0
    rates = Rates(lr=1e-3, weight_decay=0.0)

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        biases = [parameter for name, parameter in model.named_parameters() if name.split(".")[-1] == "bias"]
        if not biases:
            raise ConfigError("the method bitfit trains the biases of the backbone, and this backbone has none")
        for bias in biases:
            bias.requires_grad_(True)
