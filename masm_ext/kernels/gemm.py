"""``Y = X A + (T * s) C + bias`` in one kernel: a dense product whose inner dimension is extended by R columns.

Forward: X = x [M, D], A = weight^T, T = P = x v^T, C = u. Gradient of x: X = dY [M, N], A = weight, T = Q = dY u^T,
C = v, no bias. Letters of docs/method.md; IN and OUT are D and N, or N and D. docs/kernels.md explains the shapes.

T is either given (``COMPUTE_T`` false: a skinny pass has written it) or computed beside the dense product from the same
tiles of X (``COMPUTE_T``), which reads X once but repeats the skinny product in every column of tiles. T, T * s and
every sum are float32. Half-precision X: the low-rank product runs in tf32, which keeps 10 bits of T * s and the range of
float32; rounded to bfloat16 the low-rank path would miss its fidelity goal, to float16 its range.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in an order that walks GROUP rows of tiles at a time, so that those of A are found in L2."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    rows = min(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def add_low_rank(acc, T, S, C, rows, columns, M, OUT, R, PRECISION: tl.constexpr, BR: tl.constexpr):
    """acc [BM, BN] + (T * s) C for a tile; T [M, R] float32, s [R], C [R, OUT], all contiguous."""
    # not pipelined: its few loads would take the shared memory of the dense product's stages
    for begin in tl.range(0, R, BR, num_stages=1):
        rank = begin + tl.arange(0, BR)
        inside = rank < R
        t = tl.load(
            T + rows[:, None].to(tl.int64) * R + rank[None, :],
            mask=(rows[:, None] < M) & inside[None, :],
            other=0.0,
        )
        s = tl.load(S + rank, mask=inside, other=0.0).to(tl.float32)
        c = tl.load(
            C + rank[:, None].to(tl.int64) * OUT + columns[None, :],
            mask=inside[:, None] & (columns[None, :] < OUT),
            other=0.0,
        ).to(tl.float32)
        acc = tl.dot(t * s[None, :], c, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_low_rank_tile(acc, t, S, C, columns, OUT, R, PRECISION: tl.constexpr, BR: tl.constexpr):
    """The same with T in registers, [BM, BR] with BR >= R."""
    rank = tl.arange(0, BR)
    inside = rank < R
    s = tl.load(S + rank, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(
        C + rank[:, None].to(tl.int64) * OUT + columns[None, :],
        mask=inside[:, None] & (columns[None, :] < OUT),
        other=0.0,
    ).to(tl.float32)
    return tl.dot(t * s[None, :], c, acc, input_precision=PRECISION)


@triton.jit
def store_t(T, t, rows, M, R, BR: tl.constexpr):
    rank = tl.arange(0, BR)
    where = T + rows[:, None].to(tl.int64) * R + rank[None, :]
    tl.store(where, t, mask=(rows[:, None] < M) & (rank[None, :] < R))


@triton.jit
def subspace_gemm(
    X, A, T, S, V, C, BIAS, Y,
    M, OUT, IN, R,
    x_row, a_in, a_out,
    HAS_BIAS: tl.constexpr, COMPUTE_T: tl.constexpr, STORE_T: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """By pointers: any alignment, any strides of A.

    X [M, IN] with row stride ``x_row``; A [IN, OUT] with strides ``a_in``, ``a_out``; T [M, R] float32; S [R], V [R, IN]
    (read only if COMPUTE_T), C [R, OUT] of the factors' dtype, contiguous; BIAS [OUT]; Y [M, OUT] contiguous. BR: R
    rounded up (COMPUTE_T) or a chunk of R. EVEN: IN is a multiple of BK. Grid: one program a tile of Y.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(OUT, BN), GROUP)
    rows = pid_m * BM + tl.arange(0, BM)
    columns = pid_n * BN + tl.arange(0, BN)
    inner = tl.arange(0, BK)
    in_m, in_n = rows[:, None] < M, columns[None, :] < OUT
    x_at = X + rows[:, None].to(tl.int64) * x_row + inner[None, :]
    a_at = A + inner[:, None].to(tl.int64) * a_in + columns[None, :].to(tl.int64) * a_out
    acc = tl.zeros((BM, BN), tl.float32)
    if COMPUTE_T:
        rank = tl.arange(0, BR)
        t = tl.zeros((BM, BR), tl.float32)
        v_at = V + rank[None, :].to(tl.int64) * IN + inner[:, None]
    for k in range(0, IN, BK):
        if EVEN:
            x = tl.load(x_at, mask=in_m, other=0.0)
            a = tl.load(a_at, mask=in_n, other=0.0)
        else:
            left = inner < IN - k
            x = tl.load(x_at, mask=in_m & left[None, :], other=0.0)
            a = tl.load(a_at, mask=in_n & left[:, None], other=0.0)
        acc = tl.dot(x, a, acc, input_precision=PRECISION)
        if COMPUTE_T:
            if EVEN:
                v = tl.load(v_at, mask=rank[None, :] < R, other=0.0)
            else:
                v = tl.load(v_at, mask=(rank[None, :] < R) & (inner < IN - k)[:, None], other=0.0)
            t = tl.dot(x, v.to(x.dtype), t, input_precision=PRECISION)
            v_at += BK
        x_at += BK
        a_at += BK * a_in
    if COMPUTE_T:
        if STORE_T:
            if pid_n == 0:
                store_t(T, t, rows, M, R, BR)
        acc = add_low_rank_tile(acc, t, S, C, columns, OUT, R, LOW_PRECISION, BR)
    else:
        acc = add_low_rank(acc, T, S, C, rows, columns, M, OUT, R, LOW_PRECISION, BR)
    if HAS_BIAS:
        acc += tl.load(BIAS + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    y_at = Y + rows[:, None].to(tl.int64) * OUT + columns[None, :]
    tl.store(y_at, acc.to(Y.dtype.element_ty), mask=in_m & in_n)


@triton.jit
def subspace_gemm_tma(
    x_desc, a_desc, y_desc, T, S, V, C, BIAS,
    M, OUT, IN, R,
    HAS_BIAS: tl.constexpr, COMPUTE_T: tl.constexpr, STORE_T: tl.constexpr, A_IS_OUT_IN: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """By tensor descriptors (the TMA of sm_90 and later): tiles of X, A and Y are moved by hardware, which needs rows
    that start at multiples of 16 bytes and pads what is outside with zeros.

    x_desc: blocks [BM, BK] of X [M, IN]. a_desc: blocks [BN, BK] of the weight [OUT, IN] if A_IS_OUT_IN, else blocks
    [BK, BN] of [IN, OUT]. y_desc: blocks [BM, BN] of Y. The rest as in :func:`subspace_gemm`.
    """
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(OUT, BN), GROUP)
    row, column = pid_m * BM, pid_n * BN
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    if COMPUTE_T:
        rank, inner = tl.arange(0, BR), tl.arange(0, BK)
        t = tl.zeros((BM, BR), tl.float32)
        v_at = V + rank[None, :].to(tl.int64) * IN + inner[:, None]
    for k in range(0, IN, BK):
        x = x_desc.load([row, k])
        if A_IS_OUT_IN:
            acc = tl.dot(x, a_desc.load([column, k]).T, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(x, a_desc.load([k, column]), acc, input_precision=PRECISION)
        if COMPUTE_T:
            v = tl.load(v_at, mask=(rank[None, :] < R) & (inner < IN - k)[:, None], other=0.0)
            t = tl.dot(x, v.to(x.dtype), t, input_precision=PRECISION)
            v_at += BK
    if COMPUTE_T:
        if STORE_T:
            if pid_n == 0:
                store_t(T, t, rows, M, R, BR)
        acc = add_low_rank_tile(acc, t, S, C, columns, OUT, R, LOW_PRECISION, BR)
    else:
        acc = add_low_rank(acc, T, S, C, rows, columns, M, OUT, R, LOW_PRECISION, BR)
    if HAS_BIAS:
        acc += tl.load(BIAS + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    y_desc.store([row, column], acc.to(y_desc.dtype))
