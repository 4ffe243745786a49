"""Launches the kernels: the dense product with its low-rank part, and the skinny products around it.

Every function takes the GPU it is for (`target`) and, instead of the tile that tuning chooses, a `tile`. What a
function returns is written by kernels queued on the current stream; the host waits for nothing.

J layers of one shape that read the same x go through one call. Their factors lie one layer after another; R below is
that of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..ops.strategies import ADDMM, FOLDED, KEXT, MAX_LAYERS, SINGLE
from ..ops.subspace_linear_group import lie_side_by_side
from . import fold_weight, gemm, skinny, tuning
from .launch import Target, Tile, cdiv, low_rank_precision, padded, precision, run
from .tiles import BOTH, GEMM, GEMM_TMA, INNER, REDUCE, SKINNY, SMALL, SMALL_ROWS, UNALIGNED, WIDE_T, rank_tile, tiles

GROUP = 8  # rows of tiles that share the tiles of the weight in L2


class Factor(NamedTuple):
    """The artifact part of X A + (T * s) C, T = X V^T: forward (s, v, u), for dX (s, u, v). s [J R], v, c [J R,
    ...]."""

    s: Tensor
    v: Tensor
    c: Tensor


class Live(NamedTuple):
    """Masks as kernels read them, on the GPU: uint8 [J K], or None; `offsets` are the K + 1 row bounds of one layer."""

    mask: Tensor | None
    offsets: tuple[int, ...]

    @classmethod
    def of(cls, masks: Sequence[Tensor], offsets: Sequence[int]) -> Live:
        return cls(side_by_side(masks).view(torch.uint8) if masks else None, tuple(offsets))

    @property
    def constants(self) -> dict[str, Any]:
        given = self.mask is not None and self.offsets[-1] > 0
        return dict(HAS_MASK=given, OFFSETS=self.offsets if given else None)


def as_rows(t: Tensor) -> Tensor:
    """[..., W] as a matrix whose rows are contiguous; copied only where they are not."""
    rows = t.reshape(math.prod(t.shape[:-1]), t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


def side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as one, along the first dimension: a view where they lie so in memory, else a copy."""
    first = tensors[0]
    if len(tensors) == 1:
        return first.contiguous()
    if lie_side_by_side(tensors):
        return first.as_strided((len(tensors) * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat([t.contiguous() for t in tensors])


def _by_layer(t: Tensor, layers: int) -> Tensor:
    """[J rows, ...] as [J, rows, ...]."""
    return t.view(layers, t.shape[0] // layers, *t.shape[1:])


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
        operands = (_by_layer(t, layers) for t in (weight, factor.c, factor.s, factor.v))
        folded = [fold(w, u, s, v, target, tile) for w, u, s, v in zip(*operands)]
        biases = [None] * layers if bias is None else _by_layer(bias, layers)
        return [F.linear(x, w, b) for w, b in zip(folded, biases)], p
    ys = [x.new_empty(M, N) for _ in range(layers)]
    if strategy == ADDMM:
        subspace_gemm([x[:, :0]], weight[:, :0].mT, p, factor, bias, ys, False, target, tile)
        for y, w in zip(ys, _by_layer(weight, layers)):
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
    others read (`folded` does not)."""
    M, D, layers = dys[0].shape[0], weight.shape[1], len(dys)
    if strategy == FOLDED:
        dx = None
        for dy, w, u, s, v in zip(dys, *(_by_layer(t, layers) for t in (weight, factor.v, factor.s, factor.c))):
            folded = fold(w, u, s, v, target, tile)
            dx = dy @ folded if dx is None else dx.addmm_(dy, folded)
        return dx
    dx = dys[0].new_empty(M, D)
    if strategy == ADDMM:
        subspace_gemm([dy[:, :0] for dy in dys], weight[:0], q, factor, None, [dx], False, target, tile)
        for dy, w in zip(dys, _by_layer(weight, layers)):
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
    and, if there is one, written.
    """
    parts, members, y = len(xs), len(ys), ys[0]
    (M, IN), OUT, R = xs[0].shape, y.shape[1], factor.s.shape[0] // (parts * members)
    if M == 0 or OUT == 0:
        if compute_t and t is not None:  # no tile of y computes it
            for x, v, column in zip(xs, _by_layer(factor.v, parts), t.split(t.shape[1] // parts, 1)):
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
    _launch(launch, WIDE_T if wide_t else kernel, target, a.dtype, tile, M, R, *form)


def _padded_list(items: Sequence[Any]) -> list[Any]:
    """Operands for each layer that a kernel has room for, None where there is none."""
    return [*items, *[None] * (MAX_LAYERS - len(items))]


def fits_tma(target: Target, dtype: torch.dtype) -> bool:
    """Do GEMMs of this type go through the TMA? On sm_90 and sm_100; float32 only as tf32."""
    exact = dtype == torch.float32 and precision(dtype) == "ieee"
    return shared_operands(target) and not exact


def shared_operands(target: Target) -> bool:
    """Do the tensor cores read tiles from shared memory (wgmma, tcgen05)? Others take them from registers."""
    return 90 <= target.capability < 120


def aligned(*matrices: Tensor) -> bool:
    """Can tiles be moved 16 bytes at a time? Rows contiguous, apart from one another, at multiples of 16 bytes."""
    return all(
        t.numel() == 0
        or (
            t.stride(1) == 1
            and t.stride(0) >= t.shape[1]
            and t.stride(0) * t.itemsize % 16 == 0
            and t.data_ptr() % 16 == 0
        )
        for t in matrices
    )


def skinny_product(z: Tensor, b: Tensor, out: Tensor, target: Target, tile: Tile | None = None) -> None:
    """out [M, R] float32 = Z B^T. Z [M, W] with contiguous rows, B [R, W] contiguous; out may be columns of a
    matrix."""
    (M, W), R = z.shape, b.shape[0]
    rank = rank_tile(R, 64)

    def launch(tile: Tile) -> None:
        grid = (cdiv(M, tile.BM), cdiv(R, rank))
        constants = dict(PRECISION=precision(z.dtype), EVEN=W % tile.BK == 0, BM=tile.BM, BW=tile.BK, BR=rank)
        operands = (z, b, out, M, W, R, z.stride(0), out.stride(0))
        run(skinny.skinny, grid, *operands, **constants, warps=tile.warps, stages=tile.stages)

    _launch(launch, SKINNY, target, z.dtype, tile, M, R, W, b.dtype)


def chunk_rows_of(M: int, BM: int, programs: int, target: Target) -> int:
    """Rows of a chunk, a multiple of BM: as many chunks as make two programs an SM, each of two tiles or more."""
    chunks = max(1, min(2 * target.processors // max(1, programs), cdiv(M, 2 * BM)))
    return max(1, cdiv(M, chunks * BM)) * BM


class Sums(NamedTuple):
    """Parts of sums over rows, by chunks of rows: of T^T Z [chunks, rows, W] (live rows first), P * T, and Z."""

    g: Tensor
    ds: Tensor | None
    total: Tensor | None


def reduce_rows(
    z: Sequence[Tensor],
    t: Tensor,
    live: Sequence[Live],
    target: Target,
    tile: Tile | None = None,
    p: Tensor | None = None,
    need_sum: bool = False,
) -> Sums:
    """T_j^T Z_j for J matrices Z_j [M, W] and the columns T_j [M, R] of t [M, J R], in J launches: g [chunks, J R, W].

    p [M, J R], for one Z only: also the parts of sum_m P * T [chunks, J R]. need_sum: also of sum_m Z_j [chunks, J W].
    """
    (M, W), J, R = z[0].shape, len(z), t.shape[1] // len(z)
    rank = rank_tile(R, 64)
    sums: list[Sums] = []

    def launch(tile: Tile) -> None:
        tiles_w, tiles_r = max(1, cdiv(W, tile.BN)), max(1, cdiv(R, rank))
        rows = chunk_rows_of(M, tile.BM, tiles_w * tiles_r, target)
        chunks = cdiv(M, rows)
        sums[:] = [_new_sums(t, chunks, W, J, p is not None, need_sum)]
        g, ds, total = sums[0]
        constants = dict(HAS_DS=p is not None, HAS_SUM=need_sum, PRECISION=precision(z[0].dtype))
        sizes = dict(BM=tile.BM, BW=tile.BN, BR=rank, RP=padded(R), warps=tile.warps, stages=tile.stages)
        for j in range(J):
            g_j, t_j, total_j = _layer_of(j, R, W, g, t, total)
            operands = (z[j], t_j, p, g_j, ds, total_j, live[j].mask)
            strides = (z[j].stride(0), t.stride(0), J * R, J * W, rows)
            grid = (tiles_w, chunks, tiles_r)
            run(skinny.skinny_reduce, grid, *operands, M, W, R, *strides, **live[j].constants, **constants, **sizes)

    _launch(launch, REDUCE, target, z[0].dtype, tile, M, R, W, J, live[0].mask is None, p is not None, need_sum)
    return sums[0]


def both_products(
    z: Sequence[Tensor],
    b: Tensor,
    t: Tensor,
    live: Sequence[Live],
    q: Tensor,
    need_sum: bool,
    target: Target,
    tile: Tile | None = None,
) -> Sums:
    """For J matrices Z_j [M, W]: write Z_j B_j^T into the columns of q [M, J R], and return the parts of T_j^T Z_j and
    of sum_m Z_j as :func:`reduce_rows` does, from one reading of each Z_j. b [J R, W], t [M, J R]."""
    (M, W), J, R = z[0].shape, len(z), t.shape[1] // len(z)
    sums: list[Sums] = []

    def launch(tile: Tile) -> None:
        tiles_w = cdiv(W, tile.BN)
        rows = chunk_rows_of(M, tile.BM, tiles_w, target)
        chunks = cdiv(M, rows)
        sums[:] = [_new_sums(t, chunks, W, J, False, need_sum)]
        g, _, total = sums[0]
        q_parts = z[0].new_empty(tiles_w, M, R, dtype=torch.float32)
        constants = dict(TABLE=False, DTYPE=None, HAS_SUM=need_sum, PRECISION=precision(z[0].dtype))
        sizes = dict(BM=tile.BM, BW=tile.BN, BR=padded(R), warps=tile.warps, stages=tile.stages)
        for j in range(J):
            g_j, t_j, total_j = _layer_of(j, R, W, g, t, total)
            operands = (z[j], b[j * R : (j + 1) * R], t_j, q_parts, g_j, total_j, live[j].mask)
            strides = (z[j].stride(0), t.stride(0), 1, J * R, J * W, rows)
            grid = (tiles_w, chunks, 1)
            run(skinny.skinny_both, grid, *operands, M, W, R, *strides, **live[j].constants, **constants, **sizes)
            torch.sum(q_parts, 0, out=q[:, j * R : (j + 1) * R])

    _launch(launch, BOTH, target, z[0].dtype, tile, M, R, W, J, b.dtype, live[0].mask is None, need_sum)
    return sums[0]


def _new_sums(t: Tensor, chunks: int, W: int, J: int, need_ds: bool, need_sum: bool) -> Sums:
    def new(width: int) -> Tensor:
        return t.new_empty(chunks, width, dtype=torch.float32)

    g = t.new_empty(chunks, t.shape[1], W, dtype=torch.float32)
    return Sums(g, new(t.shape[1]) if need_ds else None, new(J * W) if need_sum else None)


def _layer_of(
    j: int, R: int, W: int, g: Tensor, t: Tensor, total: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    return g[:, j * R :], t[:, j * R :], None if total is None else total[:, j * W :]


def finish(
    du_sums: Sums | None,
    dv_sums: Sums | None,
    du: Tensor,
    dv: Tensor,
    ds: Tensor,
    db: Tensor,
    s: Tensor,
    live: Live,
    layers: int,
) -> None:
    """Add the parts into du [J R, N], dv [J R, D], ds [J R] and db [J N], those that have elements, in one launch."""
    N, D, R, BW = du.shape[-1], dv.shape[-1], s.shape[0], 256
    du_parts, db_parts = (du_sums.g, du_sums.total) if du_sums is not None else (None, None)
    dv_parts, ds_parts = (dv_sums.g, dv_sums.ds) if dv_sums is not None else (None, None)
    chunks = [0 if t is None else t.shape[0] for t in (du_parts, dv_parts, ds_parts)]
    du_programs = R * cdiv(N, BW) if du.numel() else 0
    dv_programs = R * cdiv(D, BW) if dv.numel() else 0
    db_programs = cdiv(db.shape[0], BW)
    grid = (du_programs + dv_programs + (ds.numel() > 0) + db_programs,)
    given = dict(HAS_DU=du_programs > 0, HAS_DV=dv_programs > 0, HAS_DS=ds.numel() > 0, HAS_DB=db_programs > 0)
    parts = (du_parts, dv_parts, ds_parts, db_parts)
    sizes = (N, D, R, R // layers, db.shape[0], *chunks, du_programs, dv_programs)
    operands = (*parts, du, dv, ds, db, s, live.mask, *sizes)
    run(skinny.finish, grid, *operands, **given, **live.constants, BW=BW, RP=padded(R), warps=4)


def fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor, target: Target, tile: Tile | None = None) -> Tensor:
    """weight + u^T diag(s) v, [N, D] contiguous, in the dtype of weight."""
    (N, D), R = weight.shape, s.shape[0]
    out = weight.new_empty(N, D)
    BM, BN = (tile.BM, tile.BN) if tile is not None else (64, 64)
    grid = (cdiv(D, BN), cdiv(N, BM))
    operands = (weight, u.contiguous(), s.contiguous(), v.contiguous(), out, N, D, R, *weight.stride())
    run(fold_weight.fold_weight, grid, *operands, BM=BM, BN=BN, BR=16, warps=8)
    return out


def _launch(
    launch: Callable[[Tile], None],
    kernel: str,
    target: Target,
    dtype: torch.dtype,
    tile: Tile | None,
    M: int,
    *key: object,
) -> None:
    """Run with the given tile, or with the one that tuning chooses for (kernel, M, key)."""
    if tile is None:
        candidates = tiles(kernel, target, dtype, precision(dtype))
        tile = tuning.choose(target, tuning.key_of(kernel, M, dtype, precision(dtype), *key), candidates, launch)
    launch(tile)
