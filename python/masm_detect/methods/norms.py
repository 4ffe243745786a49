"""LayerNorm tuning: the scale and shift of every LayerNorm of the backbone are trained, and the head.

Source: Yermakov et al., "Deepfake Detection that Generalizes Across Benchmarks" (GenD), arXiv 2508.06248, after Basu et
al., "Strong Baselines for Parameter-Efficient Few-Shot Fine-Tuning", AAAI 2024.
"""

from __future__ import annotations

from torch import nn

from masm_detect.config import ConfigError, MethodConfig

from .method import MethodSpec, Rates


class LayerNormTuning(MethodSpec):
    """Trains the weights of all LayerNorms, and the head."""

    # decay would pull the scales, which are near 1, towards 0
    rates = Rates(lr=1e-3, weight_decay=0.0)

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm) and module.elementwise_affine]
        if not norms:
            raise ConfigError("the method ln trains the LayerNorms of the backbone, and this backbone has none")
        for norm in norms:
            norm.requires_grad_(True)
