"""Effort: the last singular direction of each layer is trained. Written here from the publication; no code was taken.

Source: Yan et al., "Orthogonal Subspace Decomposition for Generalizable AI-Generated Image Detection" (Effort), ICML
2025, arXiv 2411.15633. Its published setting: rank r = q - 1 is frozen, so one residual direction is trained in
each attention projection, the dense weight is rebuilt in every forward pass, and the loss is plain cross-entropy.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masm_detect.config import MethodConfig

from .layers import check_rank, replace_module
from .method import MethodSpec, Rates


class EffortLinear(nn.Module):
    """`y = x (weight + u^T diag(s) v)^T + b`, the sum rebuilt and differentiated by autograd in each forward pass.

    Shapes (N out_features, D in_features, R trained directions): `weight` [N, D] frozen buffer, the top q - R
    singular directions; `u` [R, N], `s` [R], `v` [R, D] trained; `bias` [N] frozen.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, u: Tensor, s: Tensor, v: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.u = nn.Parameter(u)
        self.s = nn.Parameter(s)
        self.v = nn.Parameter(v)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int = 1) -> EffortLinear:
        """Split `linear` at its last `rank` singular directions; the output is unchanged up to rounding.

        Raises ValueError if `rank` is not in 1..q - 1 with q = min(N, D).
        """
        q = min(linear.weight.shape)
        if not 1 <= rank < q:
            raise ValueError(f"effort trains {rank} residual directions, but this layer has q = {q}: give 1..{q - 1}")
        weight = linear.weight.detach()
        # SVD and split in float64: otherwise the frozen part has the rounding errors of the removed part.
        left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
        u, s, v = left[:, q - rank :].T, sigma[q - rank :], right[q - rank :]
        frozen = weight.double() - (u.T * s) @ v
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls(*(frozen.to(weight.dtype), bias), *(part.to(weight.dtype).contiguous() for part in (u, s, v)))

    def current_weight(self) -> Tensor:
        """The current dense weight [N, D], with its graph; summed outside autocast, so only the product is in bf16."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self.weight + (self.u.T * self.s) @ self.v

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., D] -> [..., N]."""
        return F.linear(x, self.current_weight(), self.bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, trained={self.s.numel()}"


class Effort(MethodSpec):
    """Trains the last `rank` singular directions of the target layers, and the head."""

    rates = Rates(lr=1e-3, rank=1)

    def adapt(self, model: nn.Module, names: list[str], config: MethodConfig) -> None:
        check_rank(model, names, config)
        for name in names:
            replace_module(model, name, EffortLinear.from_linear(model.get_submodule(name), config.rank))
