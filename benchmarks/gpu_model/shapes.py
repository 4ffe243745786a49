"""What the model computes the cost of: layers on one x, and the factors that an optimizer updates."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch

from masm_ext.kernels import tiles
from masm_ext.ops.strategies import (
    COMPUTED_RANK,
    FOLDED,
    MAX_LAYERS,
    MAX_RANK,
    REFERENCE,
    SINGLE,
    STREAM,
    STREAM_RANK,
    STREAM_ROWS,
    Call,
)
from masm_ext.optim.blocks import PIECE


@dataclass(frozen=True)
class Shape:
    """J `layers` of one shape on one x. `live`: directions of a layer that are not masked, all by default. `learning`:
    gradients of u, s and v are needed. `cuda_library`: libmasm_cuda is loaded."""

    M: int
    N: int
    D: int
    R: int
    layers: int = 1
    dtype: torch.dtype = torch.bfloat16
    tf32: bool = False
    learning: bool = True
    live: int | None = None
    cuda_library: bool = True

    @property
    def size(self) -> int:
        return self.dtype.itemsize

    @property
    def kind(self) -> str:
        return "half" if self.size == 2 else "tf32" if self.tf32 else "ieee"

    def calls(self, capability: int) -> tuple[Call, Call]:
        """The forward product and that of dX, as `masm_ext.ops.strategies.choose` takes them."""
        rest = (self.R, self.layers, self.dtype, capability, self.learning, self.tf32)
        dx = Call(self.M, self.D, self.N, *rest, backward=True)
        return Call(self.M, self.N, self.D, *rest, self.cuda_library), dx

    def serves(self, strategy: str) -> bool:
        """Whether the kernels can, and what was learned is kept: folding into a rounded weight loses it."""
        if strategy == REFERENCE:
            return True
        held = self.R * self.layers <= MAX_RANK and self.layers <= MAX_LAYERS and self.size < 8
        exact = self.kind == "ieee" or strategy != FOLDED
        if strategy == STREAM:
            fits = self.size == 2 and self.D % 8 == 0 and self.M <= STREAM_ROWS and self.R <= STREAM_RANK
            return held and self.cuda_library and fits
        most = COMPUTED_RANK if self.layers == 1 or self.M <= tiles.SMALL_ROWS else 16
        return held and exact and (strategy != SINGLE or most >= self.R)


@dataclass(frozen=True)
class Factors:
    """What a step of MaskedAdamW updates: u, s and v of the layers of `shapes` (N, D), R directions in K subspaces,
    float32. `live`: share of the blocks (layer, subspace) that are not masked. `penalized`: gradients of penalties are
    applied, too (what computing them costs is not in it)."""

    shapes: tuple[tuple[int, int], ...]
    R: int
    K: int
    live: float = 1.0
    penalized: bool = False

    @property
    def blocks(self) -> int:
        return len(self.shapes) * self.K

    @property
    def elements(self) -> int:
        return self.R * sum(N + D + 1 for N, D in self.shapes)

    @property
    def segments(self) -> int:
        """Pieces of a block's rows of one tensor, as masm_ext.optim.masked_adamw cuts them."""
        ranks = [self.R // self.K + (k < self.R % self.K) for k in range(self.K)]
        return sum(max(1, ceil(r * width / PIECE)) for N, D in self.shapes for r in ranks for width in (N, 1, D))
