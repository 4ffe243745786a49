"""masm::subspace_linear on CUDA: what is launched, in which order, for each strategy.

Strategies (``masm_ext.ops.homes`` chooses among them; docs/kernels.md says what each costs):

- ``kext``: a skinny pass for P, then one GEMM whose inner dimension is extended by R.
- ``single``: one GEMM that computes P beside the dense product. R <= 64.
- ``addmm``: low-rank part and bias first, then cuBLAS adds the dense product in place.
- ``folded``: the weight is folded once a call, then cuBLAS.

The gradient of x uses the same four, with Q for P. du, dv, ds and dbias do not depend on the strategy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import fold as fold_kernels
from . import gemm, skinny, tuning
from .launch import Target, Tile, low_rank_precision, on_device, padded, precision, run
from .tiles import (
    BOTH,
    BOTH_MAX_RANK,
    COMPUTE_T_MAX_RANK,
    GEMM,
    GEMM_TMA,
    REDUCE,
    SKINNY,
    SMALL,
    SMALL_ROWS,
    rank_tile,
    tiles,
)

STRATEGIES = ("kext", "single", "addmm", "folded")
MAX_RANK, MAX_SUBSPACES = 256, 16
GROUP = 8  # rows of tiles that share the tiles of the weight in L2


class Factor(NamedTuple):
    """One side of the artifact part for a product X A + (T * s) C, T = X V^T: forward (s, v, u), backward (s, u, v)."""

    s: Tensor
    v: Tensor
    c: Tensor


def check_supported(dtype: torch.dtype, R: int, K: int, strategy: str) -> None:
    """Raises RuntimeError if the kernels cannot serve a call, saying what can."""
    why = None
    if strategy not in STRATEGIES:
        why = f"there is no strategy {strategy!r} (there are {', '.join(STRATEGIES)}, reference)"
    elif dtype == torch.float64:
        why = "float64 is served by strategy='reference' only"
    elif R > MAX_RANK or K > MAX_SUBSPACES:
        why = f"R = {R} in K = {K} subspaces; the kernels serve R <= {MAX_RANK} and K <= {MAX_SUBSPACES}"
    elif strategy == "single" and R > COMPUTE_T_MAX_RANK:
        why = f"strategy 'single' keeps P in registers and serves R <= {COMPUTE_T_MAX_RANK}, not {R}; use 'kext'"
    if why is not None:
        raise RuntimeError(f"masm::subspace_linear on CUDA: {why}")


def forward(
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    bias: Tensor | None,
    need_p: bool,
    strategy: str,
    target: Target,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """y [..., N] and p [..., R] (no columns if not need_p). Checked arguments; `tile` instead of a tuned one."""
    lead = x.shape[:-1]
    with on_device(x):
        x2, u, s, v = as_rows(x), u.contiguous(), s.contiguous(), v.contiguous()
        bias = None if bias is None else bias.contiguous()
        y, p = product(x2, weight.mT, Factor(s, v, u), bias, need_p, strategy, target, tile)
    R = s.shape[0] if need_p else 0
    return y.view(*lead, weight.shape[0]), x.new_empty(*lead, 0, dtype=s.dtype) if p is None else p.view(*lead, R)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    u: Tensor,
    s: Tensor,
    v: Tensor,
    p: Tensor,
    mask: Tensor | None,
    offsets: Sequence[int],
    needs: tuple[bool, bool, bool, bool, bool],
    strategy: str,
    target: Target,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, du, ds, dv, dbias for `needs`; what is not needed has no elements. No host synchronisation."""
    need_dx, need_du, need_ds, need_dv, need_db = needs
    N, D = weight.shape
    none = weight.new_empty(0)
    with on_device(dy):
        dy2, u, s, v = as_rows(dy), u.contiguous(), s.contiguous(), v.contiguous()
        M = dy2.shape[0]
        p2 = p.reshape(M, -1).contiguous() if need_du or need_ds else None
        live = Live(mask, offsets, dy.device)
        factor = Factor(s, u, v)
        q, du_parts, db_parts, dx = None, None, None, none
        if need_dx and strategy == "single":
            dx, q = product(dy2, weight, factor, None, need_ds or need_dv, strategy, target, tile)
        if need_du:
            if q is None and (need_dx or need_ds or need_dv) and s.shape[0] <= BOTH_MAX_RANK:
                q, du_parts, db_parts = both_products(dy2, u, p2, live, need_db, target, tile)
            else:
                du_parts, _, db_parts = reduce_rows(dy2, p2, live, target, tile, need_sum=need_db)
        if need_dx and strategy != "single":
            dx, q = product(dy2, weight, factor, None, need_ds or need_dv, strategy, target, tile, q)
        elif q is None and (need_ds or need_dv):
            q = skinny_product(dy2, u, target, tile)
        dv_parts = ds_parts = None
        if need_dv or need_ds:
            x2 = as_rows(x) if need_dv else dy2[:, :0]
            dv_parts, ds_parts, _ = reduce_rows(x2, q, live, target, tile, p=p2 if need_ds else None)
        du, dv, ds = (torch.empty_like(t) if needed else none for t, needed in ((u, need_du), (v, need_dv), (s, need_ds)))
        db = weight.new_empty(N) if db_parts is not None else none
        finish(du_parts, dv_parts if need_dv else None, ds_parts, db_parts, du, dv, ds, db, s, live)
        if need_db and db_parts is None:
            db = dy2.sum(0, dtype=torch.float32).to(weight.dtype)
    return dx.view(x.shape) if need_dx else none, du, ds, dv, db


def as_rows(t: Tensor) -> Tensor:
    """[..., W] as a matrix whose rows are contiguous; copied only where they are not."""
    rows = t.reshape(-1, t.shape[-1]) if t.dim() != 2 else t
    return rows if rows.stride(1) == 1 or rows.shape[1] <= 1 else rows.contiguous()


class Live:
    """The mask as kernels read it: `bits` uint8 [K] and `block` int32 [R], the subspace of each row. Never on the host."""

    def __init__(self, mask: Tensor | None, offsets: Sequence[int], device: torch.device) -> None:
        self.given = mask is not None
        self.bits = mask.contiguous().view(torch.uint8) if mask is not None else None
        self.block = _blocks(tuple(offsets), device) if mask is not None else None


def _blocks(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    # a tensor made while a graph is captured lives in the graph's memory: it must not be kept for other calls
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _make_blocks.__wrapped__(offsets, device)
    return _make_blocks(offsets, device)


@lru_cache(maxsize=256)
def _make_blocks(offsets: tuple[int, ...], device: torch.device) -> Tensor:
    block = torch.empty(offsets[-1], dtype=torch.int32, device=device)
    for k, (begin, end) in enumerate(pairwise(offsets)):
        block[begin:end] = k  # fills, not a copy from the host
    return block


def product(
    x: Tensor,
    a: Tensor,
    factor: Factor,
    bias: Tensor | None,
    need_t: bool,
    strategy: str,
    target: Target,
    tile: Tile | None = None,
    t: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """X A + (T * s) C + bias, T = X V^T, and T if it is needed or given. X [M, IN], A [IN, OUT], T [M, R] float32."""
    (M, IN), OUT, R = x.shape, a.shape[1], factor.s.shape[0]
    if strategy == "folded":
        # of A^T [OUT, IN] where that is how the weight lies
        weight, u, v = (a.mT, factor.c, factor.v) if a.stride(0) == 1 else (a, factor.v, factor.c)
        folded = fold(weight, u, factor.s, v, target, tile)
        y = F.linear(x, folded if a.stride(0) == 1 else folded.mT, bias)
        if need_t and t is None:
            t = skinny_product(x, factor.v, target, tile)
        return y, t
    y = x.new_empty(M, OUT)
    if strategy == "single":
        t = x.new_empty(M, R, dtype=torch.float32) if need_t else None
        subspace_gemm(x, a, t, factor, bias, y, True, target, tile)
        return y, t
    if t is None:
        t = skinny_product(x, factor.v, target, tile)
    if strategy == "kext":
        subspace_gemm(x, a, t, factor, bias, y, False, target, tile)
    else:
        subspace_gemm(x[:, :0], a[:0], t, factor, bias, y, False, target, tile)
        y.addmm_(x, a)
    return y, t


def subspace_gemm(
    x: Tensor,
    a: Tensor,
    t: Tensor | None,
    factor: Factor,
    bias: Tensor | None,
    y: Tensor,
    compute_t: bool,
    target: Target,
    tile: Tile | None = None,
) -> None:
    """Write X A + (T * s) C + bias into y [M, OUT]; T is read, or with `compute_t` computed and kept in t if given."""
    (M, IN), OUT, R = x.shape, a.shape[1], factor.s.shape[0]
    if M == 0 or OUT == 0:
        return
    out_in = a.stride(0) == 1 or (IN == 1 and a.stride(1) != 1)  # the weight lies as [OUT, IN]
    use_tma = fits_tma(target, x, a.mT if out_in else a, y)
    small = compute_t and M <= SMALL_ROWS
    kernel = SMALL if small else GEMM_TMA if use_tma else GEMM
    constants = dict(
        HAS_BIAS=bias is not None,
        COMPUTE_T=compute_t,
        STORE_T=compute_t and t is not None,
        PRECISION=precision(x.dtype),
        LOW_PRECISION=low_rank_precision(x.dtype),
        BR=padded(R) if compute_t else rank_tile(R, 32),
        GROUP=GROUP,
    )

    def launch(tile: Tile) -> None:
        grid = (triton.cdiv(M, tile.BM) * triton.cdiv(OUT, tile.BN),)
        options = dict(**constants, BM=tile.BM, BN=tile.BN, BK=tile.BK, warps=tile.warps, stages=tile.stages)
        low_rank = (t, factor.s, factor.v, factor.c, bias)
        if kernel == GEMM_TMA:
            x_desc = TensorDescriptor.from_tensor(x, [tile.BM, tile.BK])
            if out_in:
                a_desc = TensorDescriptor.from_tensor(a.mT, [tile.BN, tile.BK])
            else:
                a_desc = TensorDescriptor.from_tensor(a, [tile.BK, tile.BN])
            y_desc = TensorDescriptor.from_tensor(y, [tile.BM, tile.BN])
            operands = (x_desc, a_desc, y_desc, *low_rank, M, OUT, IN, R)
            run(gemm.subspace_gemm_tma, grid, *operands, A_IS_OUT_IN=out_in, **options)
        else:
            operands = (x, a, *low_rank, y, M, OUT, IN, R, x.stride(0), *a.stride())
            run(gemm.subspace_gemm, grid, *operands, EVEN=IN % tile.BK == 0, **options)

    _launch(launch, kernel, target, x.dtype, R, tile, M, OUT, IN, compute_t, out_in, factor.s.dtype)


def fits_tma(target: Target, *matrices: Tensor) -> bool:
    """Can the TMA move tiles of these? sm_90 and sm_100; rows contiguous and at multiples of 16 bytes; nothing empty;
    float32 only as tf32."""
    if not 90 <= target.capability < 120 or (
        matrices[0].dtype == torch.float32 and precision(torch.float32) == "ieee"
    ):
        return False
    return all(
        t.numel() > 0 and t.stride(1) == 1 and t.stride(0) * t.itemsize % 16 == 0 and t.data_ptr() % 16 == 0
        for t in matrices
    )


def skinny_product(z: Tensor, b: Tensor, target: Target, tile: Tile | None = None) -> Tensor:
    """T [M, R] float32 = Z B^T. Z [M, W] with contiguous rows, B [R, W] contiguous."""
    (M, W), R = z.shape, b.shape[0]
    t = z.new_empty(M, R, dtype=torch.float32)
    rank = rank_tile(R, 64)

    def launch(tile: Tile) -> None:
        grid = (triton.cdiv(M, tile.BM), triton.cdiv(R, rank))
        constants = dict(PRECISION=precision(z.dtype), EVEN=W % tile.BK == 0, BM=tile.BM, BW=tile.BK, BR=rank)
        run(skinny.skinny, grid, z, b, t, M, W, R, z.stride(0), **constants, warps=tile.warps, stages=tile.stages)

    _launch(launch, SKINNY, target, z.dtype, R, tile, M, W, b.dtype)
    return t


def chunk_rows_of(M: int, BM: int, programs: int, target: Target) -> int:
    """Rows of a chunk, a multiple of BM: as many chunks as make two programs an SM, each of two tiles or more."""
    chunks = max(1, min(2 * target.processors // max(1, programs), triton.cdiv(M, 2 * BM)))
    return max(1, triton.cdiv(M, chunks * BM)) * BM


def reduce_rows(
    z: Tensor,
    t: Tensor,
    live: Live,
    target: Target,
    tile: Tile | None = None,
    p: Tensor | None = None,
    need_sum: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Parts of G = T^T Z [chunks, R, W] of the live rows; of sum_m P * T [chunks, R], if p is given; of sum_m Z."""
    (M, W), R = z.shape, t.shape[1]
    rank = rank_tile(R, 64)
    parts: list[Tensor | None] = []

    def launch(tile: Tile) -> None:
        tiles_w, tiles_r = max(1, triton.cdiv(W, tile.BN)), triton.cdiv(R, rank)
        rows = chunk_rows_of(M, tile.BM, tiles_w * tiles_r, target)
        chunks = triton.cdiv(M, rows)
        new = dict(dtype=torch.float32)
        g = z.new_empty(chunks, R, W, **new)
        ds = z.new_empty(chunks, R, **new) if p is not None else None
        total = z.new_empty(chunks, W, **new) if need_sum else None
        parts[:] = g, ds, total
        constants = dict(HAS_MASK=live.given, HAS_DS=p is not None, HAS_SUM=need_sum, PRECISION=precision(z.dtype))
        sizes = dict(BM=tile.BM, BW=tile.BN, BR=rank, RP=padded(R), warps=tile.warps, stages=tile.stages)
        operands = (z, t, p, g, ds, total, live.bits, live.block, M, W, R, z.stride(0), rows)
        run(skinny.skinny_reduce, (tiles_w, chunks, tiles_r), *operands, **constants, **sizes)

    _launch(launch, REDUCE, target, z.dtype, R, tile, M, W, live.given, p is not None, need_sum)
    return tuple(parts)


def both_products(
    z: Tensor, b: Tensor, t: Tensor, live: Live, need_sum: bool, target: Target, tile: Tile | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Z B^T [M, R], and the parts of T^T Z [chunks, R, W] and of sum_m Z [chunks, W], from one reading of Z [M, W]."""
    (M, W), R = z.shape, b.shape[0]
    parts: list[Tensor | None] = []

    def launch(tile: Tile) -> None:
        tiles_w = triton.cdiv(W, tile.BN)
        rows = chunk_rows_of(M, tile.BM, tiles_w, target)
        chunks = triton.cdiv(M, rows)
        new = dict(dtype=torch.float32)
        q, g = z.new_empty(tiles_w, M, R, **new), z.new_empty(chunks, R, W, **new)
        total = z.new_empty(chunks, W, **new) if need_sum else None
        parts[:] = q, g, total
        constants = dict(TABLE=False, DTYPE=None, HAS_MASK=live.given, HAS_SUM=need_sum, PRECISION=precision(z.dtype))
        sizes = dict(BM=tile.BM, BW=tile.BN, BR=padded(R), warps=tile.warps, stages=tile.stages)
        operands = (z, b, t, q, g, total, live.bits, live.block, M, W, R, z.stride(0), R, 1, rows)
        run(skinny.skinny_both, (tiles_w, chunks, 1), *operands, **constants, **sizes)

    _launch(launch, BOTH, target, z.dtype, R, tile, M, W, b.dtype, live.given, need_sum)
    q, g, total = parts
    return (q[0] if q.shape[0] == 1 else q.sum(0)), g, total


def finish(
    du_parts: Tensor | None,
    dv_parts: Tensor | None,
    ds_parts: Tensor | None,
    db_parts: Tensor | None,
    du: Tensor,
    dv: Tensor,
    ds: Tensor,
    db: Tensor,
    s: Tensor,
    live: Live,
) -> None:
    """Add the parts into du, dv, ds and db, those that have parts, in one launch."""
    N, D, R, BW = du.shape[-1], dv.shape[-1], s.shape[0], 256
    if R == 0:
        return
    chunks = [0 if t is None else t.shape[0] for t in (du_parts, dv_parts, ds_parts)]
    du_programs = R * triton.cdiv(N, BW) if du_parts is not None else 0
    dv_programs = R * triton.cdiv(D, BW) if dv_parts is not None else 0
    db_programs = triton.cdiv(db.shape[0], BW) if db_parts is not None else 0
    grid = (du_programs + dv_programs + (ds_parts is not None) + db_programs,)
    given = dict(HAS_DU=du_programs > 0, HAS_DV=dv_programs > 0, HAS_DS=ds_parts is not None, HAS_DB=db_programs > 0)
    parts = (du_parts, dv_parts, ds_parts, db_parts)
    operands = (*parts, du, dv, ds, db, s, live.bits, live.block, N, D, R, *chunks, du_programs, dv_programs)
    run(skinny.finish, grid, *operands, **given, HAS_MASK=live.given, BW=BW, RP=padded(R), warps=4)


def fold(weight: Tensor, u: Tensor, s: Tensor, v: Tensor, target: Target, tile: Tile | None = None) -> Tensor:
    """weight + u^T diag(s) v, [N, D] contiguous, in the dtype of weight."""
    (N, D), R = weight.shape, s.shape[0]
    out = weight.new_empty(N, D)
    BM, BN = (tile.BM, tile.BN) if tile is not None else (64, 64)
    grid = (triton.cdiv(D, BN), triton.cdiv(N, BM))
    operands = (weight, u.contiguous(), s.contiguous(), v.contiguous(), out, N, D, R, *weight.stride())
    run(fold_kernels.fold_weight, grid, *operands, BM=BM, BN=BN, BR=16, warps=8)
    return out


def _launch(
    launch: Callable[[Tile], None],
    kernel: str,
    target: Target,
    dtype: torch.dtype,
    R: int,
    tile: Tile | None,
    M: int,
    *key: object,
) -> None:
    """Run with the given tile, or with the one that tuning chooses for (kernel, M, R, key)."""
    if tile is None:
        candidates = tiles(kernel, target, dtype, precision(dtype))
        tile = tuning.choose(target, tuning.key_of(kernel, M, R, dtype, precision(dtype), *key), candidates, launch)
    launch(tile)
