"""``weight + u^T diag(s) v`` in float32, rounded once: one reading of weight, one writing of the result."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fold_weight(
    WEIGHT, U, S, V, OUT,
    N, D, R, w_row, w_column,
    BM: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """OUT [N, D] contiguous; WEIGHT [N, D] of any strides; U [R, N], S [R], V [R, D] contiguous.

    The product is in float32 ("ieee"): it is a few operations a byte, and tf32 would lose half of float16's mantissa.
    Grid: (tiles of D, tiles of N).
    """
    rows = tl.program_id(1) * BM + tl.arange(0, BM)
    columns = tl.program_id(0) * BN + tl.arange(0, BN)
    inside = (rows[:, None] < N) & (columns[None, :] < D)
    w_at = WEIGHT + rows[:, None].to(tl.int64) * w_row + columns[None, :].to(tl.int64) * w_column
    acc = tl.load(w_at, mask=inside, other=0.0).to(tl.float32)
    for begin in tl.range(0, R, BR, num_stages=1):
        rank = begin + tl.arange(0, BR)
        in_r = rank < R
        u = tl.load(
            U + rank[None, :].to(tl.int64) * N + rows[:, None], mask=in_r[None, :] & (rows[:, None] < N), other=0.0
        ).to(tl.float32)
        v = tl.load(
            V + rank[:, None].to(tl.int64) * D + columns[None, :],
            mask=in_r[:, None] & (columns[None, :] < D),
            other=0.0,
        ).to(tl.float32)
        s = tl.load(S + rank, mask=in_r, other=0.0).to(tl.float32)
        acc = tl.dot(u * s[None, :], v, acc, input_precision="ieee")
    out_at = OUT + rows[:, None].to(tl.int64) * D + columns[None, :]
    tl.store(out_at, acc.to(OUT.dtype.element_ty), mask=inside)
