"""Which tiles each kernel may run with, by capability: short lists; the first tile is used until they are timed.

Every entry is compiled by the tests for sm_80, sm_90 and sm_100 and must fit its shared memory without spilling
(tests/compile/registers.json). A capability between two lists uses the lower one. 8.x, with less shared memory than
8.0, and 12.x, whose tensor cores are programmed like those of 8.x, use the list of 80.
"""

from __future__ import annotations

import torch

from .launch import Target, Tile, padded

GEMM, GEMM_TMA, WIDE_T, UNALIGNED, SMALL = "gemm", "gemm_tma", "wide_t", "unaligned", "small"
SKINNY, REDUCE, BOTH, PENALTY = "skinny", "reduce", "both", "penalty"

#: (kernel, family of capability, bytes of an element) -> tiles. `gemm` and `gemm_tma`: the K-extended product and, for
#: R <= 64, its form that computes T itself; `wide_t`: `gemm_tma` where it computes more than 32 columns of T, which
#: beside 128 x 256 of Y take all 255 registers on sm_90; `small`: the form that computes T, for at most SMALL_ROWS rows
#: of X; `unaligned`: where rows do not start at multiples of 16 bytes, or the inner dimension is no multiple of BK:
#: elements are loaded through registers, each with its own condition.
TILES: dict[tuple[str, int, int], tuple[Tile, ...]] = {
    (GEMM, 80, 2): (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 4)),
    (GEMM, 80, 4): (Tile(128, 128, 16, 8, 3), Tile(64, 128, 16, 4, 3)),
    (GEMM, 90, 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    (GEMM, 90, 4): (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)),
    (GEMM, 100, 2): (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3)),
    (GEMM, 100, 4): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3)),
    (GEMM_TMA, 90, 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    (GEMM_TMA, 90, 4): (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)),
    (GEMM_TMA, 100, 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    (GEMM_TMA, 100, 4): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3)),
    (WIDE_T, 90, 2): (Tile(128, 128, 64, 8, 4), Tile(64, 128, 64, 4, 4)),
    (WIDE_T, 90, 4): (Tile(128, 128, 32, 8, 3), Tile(64, 128, 32, 4, 3)),
    (WIDE_T, 100, 2): (Tile(128, 256, 64, 8, 3), Tile(128, 128, 64, 8, 3)),
    (WIDE_T, 100, 4): (Tile(128, 128, 32, 8, 3), Tile(128, 64, 32, 4, 3)),
    (UNALIGNED, 80, 2): (Tile(64, 64, 32, 4, 2),),
    (UNALIGNED, 80, 4): (Tile(64, 64, 16, 4, 2),),
    (SMALL, 80, 2): (Tile(16, 32, 64, 4, 4), Tile(16, 64, 64, 4, 3), Tile(64, 32, 64, 4, 3)),
    (SMALL, 80, 4): (Tile(16, 32, 64, 4, 3), Tile(64, 64, 32, 4, 3)),
    (SKINNY, 80, 2): (Tile(64, 0, 64, 4, 3), Tile(32, 0, 128, 4, 2)),
    (SKINNY, 80, 4): (Tile(64, 0, 32, 4, 3),),
    (SKINNY, 90, 2): (Tile(64, 0, 128, 4, 3), Tile(64, 0, 64, 4, 4), Tile(128, 0, 64, 8, 3)),
    (SKINNY, 100, 2): (Tile(64, 0, 64, 4, 3), Tile(64, 0, 32, 4, 3)),
    (REDUCE, 80, 2): (Tile(32, 128, 0, 8, 3), Tile(64, 64, 0, 8, 3)),
    (REDUCE, 90, 2): (Tile(64, 128, 0, 8, 3), Tile(64, 64, 0, 8, 3)),
    (REDUCE, 80, 4): (Tile(32, 64, 0, 4, 3), Tile(32, 128, 0, 8, 2)),
    (BOTH, 80, 2): (Tile(32, 128, 0, 8, 3),),
    (BOTH, 80, 4): (Tile(32, 64, 0, 4, 3),),
    (BOTH, 100, 2): (Tile(32, 128, 0, 8, 3), Tile(32, 128, 0, 4, 3)),
    (PENALTY, 80, 4): (Tile(32, 64, 0, 8, 3),),
    (BOTH, 90, 2): (Tile(64, 256, 0, 8, 3), Tile(64, 128, 0, 8, 3)),
}
#: float32 products that must not be tf32 run without tensor cores: one element of the result a thread and a register.
IEEE = {
    GEMM: (Tile(64, 32, 16, 8, 2),),
    UNALIGNED: (Tile(64, 32, 16, 8, 2),),
    SMALL: (Tile(16, 32, 16, 4, 2),),
    SKINNY: (Tile(64, 0, 32, 4, 2),),
    REDUCE: (Tile(16, 64, 0, 4, 2),),
    BOTH: (Tile(16, 64, 0, 8, 3),),
}
SMALL_ROWS = 64
#: Multiple of every BK of `gemm` and `gemm_tma`.
INNER = 64


def family(kernel: str, capability: int, itemsize: int) -> int:
    """The capability in TILES whose list a capability uses."""
    served = 80 if capability >= 120 else capability
    return max(f for (name, f, size) in TILES if name == kernel and size == itemsize and f <= served)


def tiles(kernel: str, target: Target, dtype: torch.dtype, precision: str) -> tuple[Tile, ...]:
    """The tiles that `kernel` may run with on `target`; the first is the default."""
    if dtype == torch.float32 and precision == "ieee":
        return IEEE[kernel]
    return TILES[kernel, family(kernel, target.capability, dtype.itemsize), dtype.itemsize]


def both_max_rank(dtype: torch.dtype, precision: str) -> int:
    """Columns of T at most in one pass over dY: T is in registers, and products without tensor cores need more."""
    return 16 if dtype == torch.float32 and precision == "ieee" else 64


def rank_tile(R: int, most: int) -> int:
    """Columns of T that a program takes at once."""
    return min(padded(R), most)
