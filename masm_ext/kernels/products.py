"""Launches the dense product with its low-rank part, and the fold.

Every function takes the GPU it is for (`target`) and optionally a `tile` in place of the one that tuning chooses. What
it returns is written by kernels queued on the current stream; the host waits for nothing.

J layers of one shape that read the same x go through one call, their factors one layer after another; R is that of one
layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.strategies import ADDMM, FOLDED, KEXT, MAX_LAYERS, SINGLE
from . import fold_weight, gemm
from .launch import Target, Tile, cdiv, low_rank_precision, padded, precision, run
from .operands import Factor, aligned, by_layer
from .skinny_products import skinny_product
from .tiles import GEMM, GEMM_TMA, INNER, SMALL, SMALL_ROWS, UNALIGNED, WIDE_T, rank_tile
from .tuning import run_tuned

GROUP = 8  # rows of tiles that share the tiles of the weight in L2


def forward_product(
    x: Tensor,
    weight: Tensor,
    factor: Factor,
    bias: Tensor | None,
    layers: int,
    need_p: bool,
    strategy: str,
    target: Target,
    tile: Tile | None = None,
) -> tuple[list[Tensor], Tensor | None]:
    """y J x [M, N] and P [M, J R] (None if not needed). x [M, D], weight [J N, D], bias [J N]."""
    M, N = x.shape[0], weight.shape[0] // layers
    p = x.new_empty(M, factor.s.shape[0], dtype=torch.float32) if need_p or strategy in (KEXT, ADDMM) else None
    if p is not None and strategy != SINGLE:
        skinny_product(x, factor.v, p, target, tile)
    if strategy == FOLDED:
        operands = (by_layer(t, layers) for t in (weight, factor.c, factor.s, factor.v))
        folded = [fold(w, u, s, v, target, tile) for w, u, s, v in zip(*operands)]
        biases = [None] * layers if bias is None else by_layer(bias, layers)
        return [F.linear(x, w, b) for w, b in zip(folded, biases)], p
    ys = [x.new_empty(M, N) for _ in range(layers)]
    if strategy == ADDMM:
        subspace_gemm([x[:, :0]], weight[:, :0].mT, p, factor, bias, ys, False, target, tile)
        for y, w in zip(ys, by_layer(weight, layers)):
            y.addmm_(x, w.mT)
    else:
        subspace_gemm([x], weight.mT, p, factor, bias, ys, strategy == SINGLE, target, tile)
    return ys, p


def input_gradient(
    dys: Sequence[Tensor],
    weight: Tensor,
    factor: Factor,
    q: Tensor,
    strategy: str,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """dX [M, D], the sum over the layers. dys J x [M, N], weight [J N, D]; q [M, J R]: Q, which `single` writes and the
    others read, except `folded`."""
    M, D, layers = dys[0].shape[0], weight.shape[1], len(dys)
    if strategy == FOLDED:
        dx = None
        for dy, w, u, s, v in zip(dys, *(by_layer(t, layers) for t in (weight, factor.v, factor.s, factor.c))):
            folded = fold(w, u, s, v, target, tile)
            dx = dy @ folded if dx is None else dx.addmm_(dy, folded)
        return dx
    dx = dys[0].new_empty(M, D)
    if strategy == ADDMM:
        subspace_gemm([dy[:, :0] for dy in dys], weight[:0], q, factor, None, [dx], False, target, tile)
        for dy, w in zip(dys, by_layer(weight, layers)):
            dx.addmm_(dy, w)
    else:
        subspace_gemm(dys, weight, q, factor, None, [dx], strategy == SINGLE, target, tile)
    return dx


def subspace_gemm(
    xs: Sequence[Tensor],
    a: Tensor,
    t: Tensor | None,
    factor: Factor,
    bias: Tensor | None,
    ys: Sequence[Tensor],
    compute_t: bool,
    target: Target,
    tile: Tile | None = None,
) -> None:
    """Write sum_j X_j A_j + (T * s) C + bias into y [M, OUT]: one X and J y, or J X and one y.

    X_j [M, IN], all of one row stride; A [J IN, OUT] or [IN, J OUT]; T [M, J R] is read, or with `compute_t` computed
    and, if given, written.
    """
    parts, members, y = len(xs), len(ys), ys[0]
    (M, IN), OUT, R = xs[0].shape, y.shape[1], factor.s.shape[0] // (parts * members)
    if M == 0 or OUT == 0:
        if compute_t and t is not None:  # y has no tiles that compute it
            for x, v, column in zip(xs, by_layer(factor.v, parts), t.split(t.shape[1] // parts, 1)):
                skinny_product(x, v, column, target, tile)
        return
    if len({x.stride(0) for x in xs}) > 1:
        xs = [x.contiguous() for x in xs]
    out_in = a.stride(0) == 1 and a.stride(1) >= a.shape[0]  # the weight lies as [OUT, IN]
    matrices = (*xs, a.mT if out_in else a, y)
    tma = fits_tma(target, a.dtype)
    if compute_t and M <= SMALL_ROWS:
        kernel = SMALL
    elif not aligned(*matrices) or (IN % INNER and (parts > 1 or not tma)):
        kernel = UNALIGNED
    else:
        kernel = GEMM_TMA if tma and IN > 0 else GEMM
    constants = dict(
        MEMBERS=members,
        PARTS=parts,
        HAS_BIAS=bias is not None,
        COMPUTE_T=compute_t,
        STORE_T=compute_t and t is not None,
        PRECISION=precision(a.dtype),
        LOW_PRECISION=low_rank_precision(a.dtype),
        BR=padded(R) if compute_t else rank_tile(parts * R, 32),
        GROUP=GROUP,
    )
    t_row = 0 if t is None else t.stride(0)
    v = factor.v
    if compute_t and kernel != SMALL and shared_operands(target):
        v = v.to(a.dtype)  # float32 V would be rounded, and stored to shared memory again, for each BK columns of X

    def launch(tile: Tile) -> None:
        grid = (cdiv(M, tile.BM) * members * cdiv(OUT, tile.BN),)
        options = dict(**constants, BM=tile.BM, BN=tile.BN, BK=tile.BK, warps=tile.warps, stages=tile.stages)
        low_rank = (t, factor.s, v, factor.c, bias, *_padded_list(ys))
        if kernel == GEMM_TMA:
            x_desc = _padded_list([TensorDescriptor.from_tensor(x, [tile.BM, tile.BK]) for x in xs])
            if out_in:
                a_desc = TensorDescriptor.from_tensor(a.mT, [tile.BN, tile.BK])
            else:
                a_desc = TensorDescriptor.from_tensor(a, [tile.BK, tile.BN])
            y_desc = TensorDescriptor.from_tensor(y, [tile.BM, tile.BN]) if members == 1 else None
            operands = (*x_desc, a_desc, y_desc, *low_rank, M, OUT, IN, R, t_row)
            run(gemm.subspace_gemm_tma, grid, *operands, A_IS_OUT_IN=out_in, **options)
        else:
            operands = (*_padded_list(xs), a, *low_rank, M, OUT, IN, R, xs[0].stride(0), *a.stride(), t_row)
            run(gemm.subspace_gemm, grid, *operands, EVEN=IN % tile.BK == 0, **options)

    form = (OUT, IN, compute_t, out_in, members, parts, factor.s.dtype, v.dtype)
    wide_t = kernel == GEMM_TMA and compute_t and padded(R) > 32
    run_tuned(launch, WIDE_T if wide_t else kernel, target, a.dtype, tile, M, R, *form)


def _padded_list(items: Sequence[Any]) -> list[Any]:
    """MAX_LAYERS operands, None beyond those given."""
    return [*items, *[None] * (MAX_LAYERS - len(items))]


def fits_tma(target: Target, dtype: torch.dtype) -> bool:
    """Whether GEMMs of this type go through the TMA: on sm_90 and sm_100, float32 only as tf32."""
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    return shared_operands(target) and not exact


def shared_operands(target: Target) -> bool:
    """Whether the tensor cores read tiles from shared memory (wgmma, tcgen05), not from registers."""
    return 90 <= target.capability < 120


def fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor, target: Target, tile: Tile | None = None) -> Tensor:
    """weight + u^T diag(s) v, [N, D] contiguous, in the dtype of weight."""
    (N, D), R = weight.shape, s.shape[0]
    out = weight.new_empty(N, D)
    BM, BN = (tile.BM, tile.BN) if tile is not None else (64, 64)
    grid = (cdiv(D, BN), cdiv(N, BM))
    operands = (weight, u.contiguous(), s.contiguous(), v.contiguous(), out, N, D, R, *weight.stride())
    run(fold_weight.fold_weight, grid, *operands, BM=BM, BN=BN, BR=16, warps=8)
    return out
