"""The one table (op, device) -> home, and the one table that chooses a strategy on CUDA.

An op has exactly one home on a device, the file that serves it there; nothing falls back in silence. C++ and CUDA homes
register themselves when their library is loaded; Python homes are registered here. A device that is not in the table is
refused by PyTorch's dispatcher. Triton is imported at the first call that needs it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from .. import _library

CPP = "C++"
CUDA = "CUDA"
TRITON = "Triton"
LAYERS = "masm::subspace_linear, layer by layer"

HOMES: dict[tuple[str, str], tuple[str, str]] = {
    ("subspace_linear", "cpu"): (CPP, "csrc/cpu/subspace_linear.cpp"),
    ("subspace_linear_backward", "cpu"): (CPP, "csrc/cpu/subspace_linear.cpp"),
    # layer by layer: a CPU has little to gain from reading x once
    ("subspace_linear_group", "cpu"): (LAYERS, "masm_ext/ops/subspace_linear_group.py"),
    ("subspace_linear_group_backward", "cpu"): (LAYERS, "masm_ext/ops/subspace_linear_group.py"),
    ("subspace_penalty", "cpu"): (CPP, "csrc/cpu/subspace_penalty.cpp"),
    ("masked_adamw_", "cpu"): (CPP, "csrc/cpu/masked_adamw.cpp"),
    ("update_masks_", "cpu"): (CPP, "csrc/cpu/update_masks.cpp"),
    ("fold", "cpu"): (CPP, "csrc/cpu/fold.cpp"),
    ("subspace_linear", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_linear_backward", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_linear_group", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_linear_group_backward", "cuda"): (TRITON, "masm_ext/kernels/subspace_linear.py"),
    ("subspace_penalty", "cuda"): (TRITON, "masm_ext/kernels/subspace_penalty.py"),
    ("masked_adamw_", "cuda"): (CUDA, "csrc/cuda/masked_adamw.cu")
    if _library.CUDA_LIBRARY is not None
    else (TRITON, "masm_ext/kernels/masked_adamw.py"),
    ("update_masks_", "cuda"): (CUDA, "csrc/cuda/update_masks.cu")
    if _library.CUDA_LIBRARY is not None
    else (TRITON, "masm_ext/kernels/update_masks.py"),
    ("fold", "cuda"): (TRITON, "masm_ext/kernels/fold.py"),
}

#: How a CUDA call of subspace_linear can be computed; see masm_ext/kernels/subspace_linear.py and docs/kernels.md.
KEXT, SINGLE, STREAM, ADDMM, FOLDED, REFERENCE = "kext", "single", "stream", "addmm", "folded", "reference"
STRATEGIES = (KEXT, SINGLE, STREAM, ADDMM, FOLDED, REFERENCE)
#: Most directions, of all layers of a call together, and most layers that the kernels serve.
MAX_RANK, MAX_LAYERS = 256, 4
#: Most directions of a layer that `single` serves: T is held in registers.
COMPUTED_RANK = 64
#: Most rows of x, and directions of a layer, that `stream` serves.
STREAM_ROWS, STREAM_RANK = 64, 64


@dataclass(frozen=True)
class Call:
    """What the choice of a strategy may depend on: X [M, IN] times A [IN, OUT] with R directions, for one layer of
    `layers` that read the same x.

    backward: the call is dX, and if `learning`, du is taken from the same dY.

    learning: will any gradient of u, s or v be asked for? (That a mask is all zeros is known on the GPU only, and the
    host does not wait for it.) tf32: torch allows it for float32 products. cuda_library: `stream` can serve: a forward
    call, libmasm_cuda is loaded, and rows of the weights start at multiples of 16 bytes, as its kernel reads them.
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


#: The first rule that fits is taken. Modelled by benchmarks/model.py, not measured: no GPU has run it yet;
#: benchmarks/tune.py measures, and prints this table anew.
RULES: tuple[Rule, ...] = (
    Rule(REFERENCE, lambda c: c.dtype == torch.float64, "no tensor cores for it, and no need of speed"),
    Rule(REFERENCE, lambda c: c.R * c.layers > MAX_RANK or c.layers > MAX_LAYERS, "more than the kernels serve"),
    Rule(
        FOLDED,
        lambda c: (
            c.dtype == torch.float32 and not c.tf32 and not c.learning and 2 * c.M * (c.IN + c.OUT) >= c.IN * c.OUT
        ),
        "inference in exact float32: model, within 2% of the best from 4 images on; never where the product rounds the "
        "weight (half precision, tf32), which loses what was learned",
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
    """The strategy that serves a CUDA call, by the first of RULES that fits."""
    return next(rule.strategy for rule in RULES if rule.when(call))


def _home(op: str, file: str) -> Callable[..., Any]:
    """What serves an op whose home is a Triton file. Triton is imported when the first call comes."""

    def call(*arguments: Any) -> Any:
        try:
            module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        except ImportError as error:
            raise ImportError(
                f"masm_ext: masm::{op} is served by Triton on CUDA, and Triton cannot be imported ({error}); "
                "pip install triton, or install torch from a CUDA wheel, which brings it"
            ) from error
        return getattr(module, op)(*arguments)

    return call


for (_op, _device), (_kind, _file) in HOMES.items():
    if _kind == TRITON:
        torch.library.impl(f"masm::{_op}", _device, _home(_op, _file))
