"""The calls whose kernels are compiled: one for each way in which kernels on a GPU may differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from masm_ext.kernels import masked_adamw, products, subspace_linear, subspace_penalty, update_masks
from masm_ext.kernels.launch import Target

#: How x and the weight are multiplied -> their dtype and what torch allows for float32.
TYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "ieee": (torch.float32, "ieee"),
}
PROCESSORS = 132


class Layer(NamedTuple):
    """Forward and backward of `layers` layers on one x [M, D], with R directions each, by each strategy.

    every_tile: of all tiles that tuning may choose, not only of the default. aligned: all rows start at multiples of 16
    bytes. half_factors: u, s and v are of x's type, not float32.
    """

    name: str
    R: int
    strategies: tuple[str, ...] = ("kext", "single")
    M: int = 2056
    N: int = 1024
    D: int = 1024
    K: int = 3
    layers: int = 1
    masked: bool = False
    need_p: bool = True
    half_factors: bool = False
    every_tile: bool = False
    aligned: bool = True

    def run(self, dtype: torch.dtype, target: Target) -> None:
        M, N, D, R, J = self.M, self.N, self.D, self.R, self.layers
        factors = dtype if self.half_factors else torch.float32
        offsets = [R * k // self.K for k in range(self.K + 1)]
        x, dys = _new(M, D, dtype=dtype), [_new(M, N, dtype=dtype) for _ in range(J)]
        weight, bias = _side_by_side(J, N, D, dtype=dtype), _side_by_side(J, N, dtype=dtype)
        u, s, v = (_side_by_side(J, *shape, dtype=factors) for shape in ((R, N), (R,), (R, D)))
        mask = [_new(self.K, dtype=torch.bool) for _ in range(J)] if self.masked else []
        for strategy in self.strategies:
            arguments = (weight, u, s, v)
            _, p = subspace_linear.subspace_linear_group(
                x, *arguments, bias, mask, offsets, self.need_p, strategy, target
            )
            if self.need_p:
                subspace_linear.subspace_linear_group_backward(
                    dys, x, *arguments, p, mask, offsets, True, True, True, True, True, strategy, target
                )


class Fold(NamedTuple):
    """weight + u^T diag(s) v."""

    name: str
    R: int
    every_tile: bool = False
    aligned: bool = True

    def run(self, dtype: torch.dtype, target: Target) -> None:
        u, s, v = (_new(*shape, dtype=torch.float32) for shape in ((self.R, 1024), (self.R,), (self.R, 1024)))
        products.fold(_new(1024, 1024, dtype=dtype), u, s, v, target)


class Penalty(NamedTuple):
    """Both products of the penalty with the weights of two layers."""

    name: str
    R: int
    every_tile: bool = False
    aligned: bool = True

    def run(self, dtype: torch.dtype, target: Target) -> None:
        weights = [_new(1024, 1024, dtype=dtype) for _ in range(2)]
        a, b = (_new(2, self.R, 1024, dtype=torch.float32) for _ in range(2))
        subspace_penalty.weight_products(weights, a, b, target)


class Optimizer(NamedTuple):
    """A step over parameters of these types, with every optional argument of an optimizer."""

    name: str
    types: tuple[torch.dtype, ...]
    every_tile: bool = False
    aligned: bool = True

    def run(self, dtype: torch.dtype, target: Target) -> None:
        T = len(self.types)
        wide = [torch.float64 if t == torch.float64 else torch.float32 for t in self.types]
        params, grads = ([torch.zeros(4096, dtype=t) for t in self.types] for _ in range(2))
        moments = [[torch.zeros(4096, dtype=t) for t in wide] for _ in range(3)]
        segments = torch.tensor([[t, 0, 4096, t] for t in range(T)])
        steps, mask, hyper = torch.ones(T, dtype=torch.int64), torch.ones(T), torch.ones(T, 5, dtype=torch.float64)
        scale, found = torch.ones(1), torch.zeros(1)
        masked_adamw.masked_adamw_(params, grads, *moments, steps, mask, segments, hyper, scale, found)


class Masks(NamedTuple):
    """The policy after a step: ``keep`` layers of each subspace, or (0) those above a threshold."""

    name: str
    keep: int
    every_tile: bool = False
    aligned: bool = True

    def run(self, dtype: torch.dtype, target: Target) -> None:
        L, K, rows = 96, 4, 256
        state = (
            *(torch.zeros(2, L, K, dtype=t) for t in (torch.float64, torch.int64, torch.float32)),
            *(torch.zeros(L, K, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)),
            *(torch.zeros(rows, L, K, 4, dtype=torch.float64), torch.zeros(rows, dtype=torch.int64)),
        )
        step = (torch.zeros(L * K, 2, dtype=torch.float64), torch.zeros(1), torch.zeros(L, K, dtype=torch.bool))
        update_masks.update_masks_(*state, *step, 0.98, 50, 25, 0.1, self.keep, 0.5, 1, 100, 10, True)


def _new(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def _side_by_side(layers: int, *shape: int, dtype: torch.dtype) -> list[Tensor]:
    return list(_new(layers, *shape, dtype=dtype))


PLAIN, WIDE = Layer("R=16", R=16, every_tile=True), Layer("R=64 masked", R=64, masked=True, every_tile=True)
GROUP = Layer("3 layers R=12 masked", R=12, layers=3, masked=True)
MANY = Layer("R=256 masked", R=256, masked=True, strategies=("kext",))
EMPTY_INNER = Layer("low-rank part alone", R=16, strategies=("addmm",), every_tile=True)
UNEVEN = Layer("uneven R=12", R=12, N=1040, D=1040)
UNALIGNED = Layer("unaligned R=12", R=12, M=2055, N=1001, D=1004, aligned=False)
FEW = Layer("M=32 R=12", R=12, M=32, strategies=("single",), every_tile=True)
FEW_GROUP = Layer("4 layers M=32 R=64", R=64, M=32, layers=4, strategies=("single",))
ONES = Layer("M=N=D=R=1", M=1, N=1, D=1, R=1, K=1, masked=True, aligned=False)
FORWARD = Layer("no P", R=16, strategies=("single",), need_p=False)
HALF_FACTORS = Layer("half factors R=16", R=16, half_factors=True)
OPTIMIZER = Optimizer("optimizer", (torch.float32, torch.bfloat16, torch.float16, torch.float64))
FLOAT_OPTIMIZER = Optimizer("optimizer of float32", (torch.float32,))
BEST, THRESHOLD = Masks("best layers", keep=48), Masks("threshold", keep=0)
FOLD, PENALTY, WIDE_PENALTY = Fold("fold", R=16), Penalty("penalty R=12", R=12), Penalty("penalty R=64", R=64)

_NVIDIA = (80, 90, 100)
#: (capabilities, types, calls). What does not depend on the capability is compiled for one.
FULL = (
    (
        _NVIDIA,
        ("bf16",),
        (PLAIN, WIDE, GROUP, MANY, EMPTY_INNER, UNEVEN, UNALIGNED, FEW, FEW_GROUP, PENALTY, WIDE_PENALTY),
    ),
    (_NVIDIA, ("bf16",), (OPTIMIZER, FLOAT_OPTIMIZER, BEST, THRESHOLD)),
    ((90,), ("bf16",), (ONES, FORWARD, HALF_FACTORS, FOLD)),
    ((120,), ("bf16",), (GROUP, FEW, PENALTY)),
    (_NVIDIA, ("fp16",), (GROUP,)),
    (_NVIDIA, ("tf32",), (PLAIN, WIDE, EMPTY_INNER, UNALIGNED, FEW)),
    (_NVIDIA, ("ieee",), (PLAIN, WIDE, GROUP, UNALIGNED, FEW)),
    ((90,), ("ieee",), (PENALTY, FOLD)),
)
#: For other versions of Triton: the default tile of each kernel.
REDUCED = (
    (_NVIDIA, ("bf16",), (GROUP._replace(M=4112), UNALIGNED, FEW._replace(every_tile=False), PENALTY)),
    (_NVIDIA, ("tf32", "ieee"), (PLAIN._replace(every_tile=False),)),
    (_NVIDIA, ("bf16",), (OPTIMIZER, BEST)),
    ((90,), ("bf16",), (ONES, FOLD)),
)
#: To see within a minute that the launch code compiles.
SMOKE = (((90,), ("bf16",), (GROUP, FEW._replace(every_tile=False), PENALTY, OPTIMIZER, BEST, FOLD)),)
PLANS = {"full": FULL, "reduced": REDUCED, "smoke": SMOKE}


def groups(plan: str) -> list[tuple[int, str]]:
    """The (capability, type) of a plan."""
    return list(dict.fromkeys((c, k) for capabilities, kinds, _ in PLANS[plan] for c in capabilities for k in kinds))


def of(plan: str, capability: int, kind: str) -> list[NamedTuple]:
    """The calls of a plan for one capability and type."""
    return [
        c for capabilities, kinds, some in PLANS[plan] if capability in capabilities and kind in kinds for c in some
    ]
