"""Strategies: which kernels compute a CUDA call of subspace_linear, depending on its shapes.

The first entry of RULES that matches a Call gives the strategy. docs/kernels.md explains the strategies;
benchmarks/gpu_model/tune.py measures them and prints a new RULES table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

#: How a CUDA call of subspace_linear can be computed; see masm_ext/kernels/subspace_linear.py and docs/kernels.md.
KEXT, SINGLE, STREAM, ADDMM, FOLDED, REFERENCE = "kext", "single", "stream", "addmm", "folded", "reference"
STRATEGIES = (KEXT, SINGLE, STREAM, ADDMM, FOLDED, REFERENCE)
#: Limits of the kernels: total number of directions of all layers in a call, and number of layers.
MAX_RANK, MAX_LAYERS = 256, 4
#: Limit of `single`: directions of one layer (T is held in registers).
COMPUTED_RANK = 64
#: Limits of `stream`: rows of x, and directions of one layer.
STREAM_ROWS, STREAM_RANK = 64, 64


@dataclass(frozen=True)
class Call:
    """The properties of a call that the strategy may depend on: X [M, IN] times A [IN, OUT], R directions per layer.

    Attributes:
        M: rows of X.
        OUT: columns of A.
        IN: columns of X.
        R: directions of one layer.
        layers: number of layers that read the same x.
        dtype: dtype of X and A.
        capability: compute capability of the GPU, 90 for 9.0.
        learning: whether a gradient of u, s or v is needed. True also if all subspaces are masked, because the host
            does not read the mask from the GPU.
        tf32: whether torch allows tf32 for float32 products.
        cuda_library: whether `stream` can be used: a forward call, with libmasm_cuda loaded, and weight rows that start
            at multiples of 16 bytes.
        backward: whether the call computes dX and, if `learning`, du from the same dY.
    """

    M: int
    OUT: int
    IN: int
    R: int
    layers: int
    dtype: torch.dtype
    capability: int
    learning: bool = True
    tf32: bool = False
    cuda_library: bool = False
    backward: bool = False


@dataclass(frozen=True)
class Rule:
    """`strategy` serves the calls for which `when` is true. `why`: the evidence."""

    strategy: str
    when: Callable[[Call], bool]
    why: str


#: The first rule that matches is used. The evidence is from a cost model (benchmarks/gpu_model/model.py), not a GPU.
RULES: tuple[Rule, ...] = (
    Rule(REFERENCE, lambda c: c.dtype == torch.float64, "tensor cores do not serve it; it exists for tests"),
    Rule(REFERENCE, lambda c: c.R * c.layers > MAX_RANK or c.layers > MAX_LAYERS, "more than the kernels serve"),
    Rule(
        FOLDED,
        lambda c: (
            c.dtype == torch.float32 and not c.tf32 and not c.learning and 2 * c.M * (c.IN + c.OUT) >= c.IN * c.OUT
        ),
        "inference in exact float32: model, within 2% of the best from 4 images on; not in half precision or "
        "tf32, where rounding the folded weight loses what was learned",
    ),
    Rule(
        STREAM,
        lambda c: (
            (c.cuda_library and c.layers == 1 and c.dtype.itemsize == 2)
            and (c.M <= 16 and c.IN >= 2048 and 16 < c.R <= STREAM_RANK)
        ),
        "model, H100: 16 rows, 4096 inputs, R = 64: 11 us against 15. Above, every block reads too much of x",
    ),
    Rule(
        SINGLE,
        lambda c: (
            (c.M <= 64 and c.R <= COMPUTED_RANK)
            and (c.dtype != torch.float32 or (c.IN <= 1024 and (c.R <= 16 or c.backward)))
        ),
        "bound by reading the weight: everything else in the same launch",
    ),
    Rule(
        ADDMM,
        lambda c: c.dtype == torch.float32 and (c.tf32 or (c.R <= 16 and (c.M > 64 or c.backward))),
        "assumed, not measured: cuBLAS is ahead of Triton in float32 and tf32",
    ),
    Rule(
        REFERENCE, lambda c: c.dtype == torch.float32, "exact float32 has no tensor cores: cuBLAS's thin products win"
    ),
    Rule(
        ADDMM,
        lambda c: (
            (c.IN >= 2048 and c.M * c.OUT < 2**21)
            and ((c.backward and c.learning) or (c.layers == 1 and c.R > COMPUTED_RANK))
        ),
        "long sums and few tiles: cuBLAS splits the sum, these kernels do not. Where `single` needs no pass over X of "
        "its own it is ahead all the same",
    ),
    Rule(
        SINGLE,
        lambda c: (
            not (c.backward and c.learning)
            and (COMPUTED_RANK if c.layers == 1 else 16) >= c.R
            and (c.OUT * max(c.R, 32) <= 2**15 or c.layers * c.M * c.OUT <= (2**23 if c.R <= 32 else 2**22))
        ),
        "model, H100: P again in each column of tiles, and a launch that rounds v, cost less than a pass over x of its "
        "own. Not for dX of what learns: `kext` has Q from the pass over dY that du needs anyway",
    ),
    Rule(KEXT, lambda c: True, "model, H100: 1.14 against 1.17 of the frozen layer for OUT = 4096, R = 16"),
)


@lru_cache(maxsize=4096)
def choose(call: Call) -> str:
    """The strategy for a CUDA call: that of the first matching rule."""
    return next(rule.strategy for rule in RULES if rule.when(call))
