"""Agreement of the gradients of several domains, per block: a statistic that policies may rank layers by.

A domain is a part of the training data with its own shortcuts, in deepfake detection one kind of forgery. The hope is
that a block whose gradients agree between domains learns what they share, and not the shortcuts of one of them.

The idea is that of arXiv 2009.00329 (AND-mask: steps where gradients of environments agree) and arXiv 2109.02934
(Fishr: variance of gradients between domains); the formula is ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..cuda_graphs import is_captured
from ..nn.masm_linear import MASMLinear


class GradientAgreement:
    """The last gradient of every domain, and how it agrees with the gradient of a step.

    For a step on domain a with gradient g_a, and the last gradients g_b of the other domains: ``signal = mean_b <g_a,
    g_b>`` and ``power = ||g_a||^2``, per block. Gradients of two steps have independent noise, so noise gives a signal
    of 0 on average. It takes one float32 copy of the gradients of u, s and v for each domain.

    Args:
        layers: the L layers of a model.
        K: their number of subspaces.
    """

    def __init__(self, layers: Sequence[MASMLinear], K: int) -> None:
        self.layers, self.shape = list(layers), (len(layers), K)
        rows = []
        for row, layer in enumerate(self.layers):
            ranks = torch.tensor([b - a for a, b in pairwise(layer.offsets)])
            blocks = torch.repeat_interleave(torch.arange(row * K, (row + 1) * K), ranks)  # [R]
            for factor in (layer.u, layer.s, layer.v):
                rows.append(blocks.repeat_interleave(factor.numel() // len(blocks)))
        self.block = torch.cat(rows)  # [P]: the block of every element
        self.last: dict[int, Tensor] = {}  # domain -> [P]

    @torch.no_grad()
    def observe(
        self, domain: int, owned: Tensor, found: Tensor, grad_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare the gradients that the layers hold now with the last ones of other domains, and keep them.

        Args:
            domain: of this step.
            owned: bool [L, K], blocks that got a gradient in this step and are not masked.
            found: float32 [1], not 0 if the step was skipped: then its gradients are not kept.
            grad_scale: float32 [1], what the gradients were multiplied by (``torch.amp.GradScaler``); None: 1.

        Returns:
            (signal, power) float64 [L * K, 2], and bool [L, K]: the blocks that could be compared.

        Raises:
            RuntimeError: in the capture of a CUDA graph, which would replay one domain for ever.
        """
        device = owned.device
        if is_captured(device):
            raise RuntimeError('LayerMasks: mask_statistic "agreement" cannot be captured in a CUDA graph')
        if self.block.device != device:
            self.block = self.block.to(device)
            self.last = {name: gradient.to(device) for name, gradient in self.last.items()}
        parts = []
        for layer in self.layers:
            for factor in (layer.u, layer.s, layer.v):
                grad = factor.grad if factor.grad is not None else torch.zeros_like(factor)
                parts.append(grad.detach().reshape(-1).float())
        grad = torch.cat(parts)  # [P]
        if grad_scale is not None:
            grad = grad / grad_scale
        others = [last for other, last in self.last.items() if other != domain]
        stats = torch.zeros(owned.numel(), 2, dtype=torch.float64, device=device)
        if others:
            mean = torch.stack(others).mean(0)
            stats[:, 0].index_add_(0, self.block, (grad * mean).double())
            stats[:, 1].index_add_(0, self.block, grad.square().double())
        # a masked block has no gradient: its last one stays
        kept = owned.reshape(-1)[self.block] & (found == 0)
        self.last[domain] = torch.where(kept, grad, self.last.get(domain, torch.zeros_like(grad)))
        return stats, owned if others else torch.zeros_like(owned)

    def state(self) -> dict[str, Tensor]:
        """The last gradients, [domains, P], and their domains."""
        names = sorted(self.last)
        gradients = [self.last[name].cpu() for name in names]
        empty = torch.empty(0, len(self.block))
        return {
            "domains": torch.tensor(names, dtype=torch.int64),
            "gradients": torch.stack(gradients) if gradients else empty,
        }

    def check(self, domains: Tensor, gradients: Tensor) -> None:
        """Raise ValueError unless :meth:`restore` can take these."""
        if gradients.shape != (len(domains), len(self.block)):
            raise ValueError(
                f"LayerMasks: gradients must have shape {[len(domains), len(self.block)]}, got {list(gradients.shape)}"
            )

    def restore(self, domains: Tensor, gradients: Tensor) -> None:
        """Take a state that :meth:`state` returned."""
        device = self.block.device
        self.last = {int(name): row.clone().to(device) for name, row in zip(domains, gradients)}
