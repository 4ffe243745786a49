"""Launches the skinny products: P and Q, and the sums over rows du, dv, ds and dbias.

Arguments `target` and `tile`, and J layers in one call: as in products.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import skinny
from .launch import Target, Tile, cdiv, padded, precision, run
from .operands import Live
from .tiles import BOTH, REDUCE, SKINNY, rank_tile
from .tuning import run_tuned


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

    run_tuned(launch, SKINNY, target, z.dtype, tile, M, R, W, b.dtype)


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

    run_tuned(launch, REDUCE, target, z[0].dtype, tile, M, R, W, J, live[0].mask is None, p is not None, need_sum)
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

    run_tuned(launch, BOTH, target, z[0].dtype, tile, M, R, W, J, b.dtype, live[0].mask is None, need_sum)
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
