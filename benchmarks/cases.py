"""What is measured: shapes, model sizes and goals. Data only; how it is measured is in `bench.py` and `suites/`.

Letters as in docs/method.md: M tokens, D in_features, N out_features, K subspaces of together R directions.
A goal is the largest ratio over the floor (median of the per-round ratios) that counts as met.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SUITES = ("layer", "step", "optimizer", "losses", "decompose", "scale", "memory")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: 8 images of 257 tokens.
LAYER_TOKENS = 2056
SUBSPACES = 4


@dataclass(frozen=True)
class Options:
    """What a run was asked for. `seconds`: time budget of one comparison; `cache`: a folder for the SVDs of the run."""

    device: str = "cpu"
    threads: int | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    providers: tuple[str, ...] | None = None
    model: str = "vit-s"
    batch: int = 16
    seconds: float = 12.0
    quick: bool = False
    dry_run: bool = False
    progress: bool = False
    cache: Path | None = None

    def chosen(self, available: tuple[str, ...], floor: str | None = None) -> list[str]:
        """Those of `available` that the run asks for, the floor always among them and first."""
        wanted = [name for name in available if self.providers is None or name in self.providers]
        return wanted if floor is None else [floor, *(name for name in wanted if name != floor)]


@dataclass(frozen=True)
class Case:
    """One comparison. `goals`: {(measure, provider): largest ratio over the floor}."""

    suite: str
    name: str
    dtype: str
    floor: str
    values: dict[str, Any]
    goals: dict[tuple[str, str], float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.suite}/{self.dtype}/{self.name}"


@dataclass(frozen=True)
class VisionSize:
    """A DINOv2 vision transformer. `tokens` of one image: one a patch of 14 x 14, and the class token."""

    width: int
    depth: int
    heads: int
    image: int = 224

    @property
    def tokens(self) -> int:
        return (self.image // 14) ** 2 + 1

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(N, D) of every linear layer: query, key, value, output, and the two of the MLP."""
        w = self.width
        return [*[(w, w)] * 4, (4 * w, w), (w, 4 * w)] * self.depth

    @property
    def attention(self) -> list[tuple[int, int]]:
        """(N, D) of the attention projections."""
        return [(self.width, self.width)] * (4 * self.depth)


MODELS = {
    "tiny": VisionSize(64, 2, 2, 28),
    "vit-s": VisionSize(384, 12, 6),
    "vit-b": VisionSize(768, 12, 12),
    "vit-l": VisionSize(1024, 24, 16),
    "vit-h": VisionSize(1280, 32, 16),
}

#: (dtype, N, D, R, goal of masm for forward and backward); masm-masked has one goal for all.
LAYERS = (
    ("float32", 1024, 1024, 16, 1.08),
    ("float32", 4096, 1024, 16, 1.08),
    ("float32", 1024, 4096, 16, None),
    ("float32", 1024, 1024, 64, 1.18),
    ("bfloat16", 1024, 1024, 16, 1.25),
    ("bfloat16", 4096, 1024, 16, 1.20),
    ("bfloat16", 1024, 1024, 64, None),
)
MASKED_GOAL = 1.03
STEP_GOALS = {"float32": 1.10, "bfloat16": 1.12}
MEMORY_GOAL = 1.05
#: masked AdamW over torch's fused AdamW; and how many times faster than the loop a user would write it must be.
OPTIMIZER_GOAL = 1.2
OPTIMIZER_GAIN = 3.0
#: seconds to load an adapter of the attention layers of ViT-L.
LOAD_GOAL = 1.0
#: largest distance of a point from its straight line, over the point, that still counts as straight.
STRAIGHT = 0.10
