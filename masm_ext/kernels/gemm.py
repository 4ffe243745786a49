"""``Y = X A + (T * s) C + bias`` in one kernel: a dense product whose inner dimension is extended by R columns.

Forward: X = x [M, D], A = weight^T, T = P = x v^T, C = u. Gradient of x: X = dY [M, N], A = weight, T = Q = dY u^T,
C = v, no bias. Letters of docs/method.md; IN and OUT are D and N, or N and D. docs/kernels.md explains the shapes.

An earlier skinny pass computes T. With ``COMPUTE_T`` this kernel computes T from the tiles of X that the dense product
loads: X is read once, but every column of tiles repeats the skinny product. T, T * s and every sum are float32. If X is
half precision, the low-rank product runs in tf32, which keeps 10 bits of T * s and the range of float32. With T * s in
bfloat16 the low-rank path would miss its fidelity goal; in float16 it would underflow.

Layers of one shape that read the same x are MEMBERS of one forward product: the columns of A are those of all layers,
side by side; T, S, V, C and the bias follow one another layer by layer; each layer has its own Y. In the gradient of x
the layers are PARTS of one sum: each has its own X, the inner dimension runs over all layers, and one Y holds the sum.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tiles in groups of GROUP rows of tiles, so that tiles of A stay in L2."""
    group = program // (GROUP * tiles_n)
    first = group * GROUP
    rows = min(tiles_m - first, GROUP)
    inside = program % (GROUP * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def add_low_rank(acc, T, S, C, rows, columns, M, OUT, R, t_row, PRECISION: tl.constexpr, BR: tl.constexpr):
    """acc [BM, BN] + (T * s) C for a tile; T [M, R] float32 with row stride t_row, s [R], C [R, OUT]."""
    # not pipelined: its loads would take shared memory from the stages of the dense product
    for begin in tl.range(0, R, BR, num_stages=1):
        rank = begin + tl.arange(0, BR)
        inside = rank < R
        t = tl.load(
            T + rows[:, None].to(tl.int64) * t_row + rank[None, :],
            mask=(rows[:, None] < M) & inside[None, :],
            other=0.0,
        )
        acc = add_low_rank_tile(acc, t, S, C, columns, OUT, R, begin, PRECISION, BR)
    return acc


@triton.jit
def add_low_rank_tile(acc, t, S, C, columns, OUT, R, begin, PRECISION: tl.constexpr, BR: tl.constexpr):
    """The same for columns begin .. begin + BR of T, in registers."""
    rank = begin + tl.arange(0, BR)
    inside = rank < R
    s = tl.load(S + rank, mask=inside, other=0.0).to(tl.float32)
    c = tl.load(
        C + rank[:, None].to(tl.int64) * OUT + columns[None, :],
        mask=inside[:, None] & (columns[None, :] < OUT),
        other=0.0,
    ).to(tl.float32)
    return tl.dot(t * s[None, :], c, acc, input_precision=PRECISION)


@triton.jit
def store_t(T, t, rows, M, R, t_row, BR: tl.constexpr):
    rank = tl.arange(0, BR)
    where = T + rows[:, None].to(tl.int64) * t_row + rank[None, :]
    tl.store(where, t, mask=(rows[:, None] < M) & (rank[None, :] < R))


@triton.jit
def store_y(Y0, Y1, Y2, Y3, BIAS, acc, rows, columns, member, M, OUT, MEMBERS: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Y of a member [M, OUT] = acc + its bias, one tile."""
    if HAS_BIAS:
        acc += tl.load(BIAS + member * OUT + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
    y = Y0
    if MEMBERS > 1:
        if member == 1:
            y = Y1
    if MEMBERS > 2:
        if member == 2:
            y = Y2
    if MEMBERS > 3:
        if member == 3:
            y = Y3
    where = y + rows[:, None].to(tl.int64) * OUT + columns[None, :]
    tl.store(where, acc.to(Y0.dtype.element_ty), mask=(rows[:, None] < M) & (columns[None, :] < OUT))


@triton.jit(do_not_specialize=["M"])
def subspace_gemm(
    X0, X1, X2, X3, A, T, S, V, C, BIAS, Y0, Y1, Y2, Y3,
    M, OUT, IN, R,
    x_row, a_in, a_out, t_row,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, COMPUTE_T: tl.constexpr, STORE_T: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr, EVEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """By pointers: any alignment, any strides of A.

    X0 .. X[PARTS - 1] [M, IN] with row stride ``x_row``; A [PARTS IN, MEMBERS OUT] with strides ``a_in``, ``a_out``; T
    [M, PARTS MEMBERS R] float32, row stride t_row; S [PARTS MEMBERS R], V [.., IN] (read only if COMPUTE_T) and C
    [.., OUT] contiguous, of the factors' dtype; BIAS [MEMBERS, OUT]; Y0 .. Y[MEMBERS - 1] [M, OUT] contiguous. BR: R
    rounded up (COMPUTE_T) or a chunk of R. EVEN: IN is a multiple of BK. Grid: one program a tile of Y.
    """
    tiles_out = tl.cdiv(OUT, BN)
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), MEMBERS * tiles_out, GROUP)
    member, tile = pid_n // tiles_out, pid_n % tiles_out
    rows = pid_m * BM + tl.arange(0, BM)
    columns = tile * BN + tl.arange(0, BN)
    inner, rank = tl.arange(0, BK), tl.arange(0, BR)
    in_m, in_n = rows[:, None] < M, columns[None, :] < OUT
    x_offset = rows[:, None].to(tl.int64) * x_row + inner[None, :]
    a_column = (member * OUT + columns[None, :]).to(tl.int64) * a_out
    acc = tl.zeros((BM, BN), tl.float32)
    for part in tl.static_range(PARTS):
        if part == 0:
            x_at = X0 + x_offset
        elif part == 1:
            x_at = X1 + x_offset
        elif part == 2:
            x_at = X2 + x_offset
        else:
            x_at = X3 + x_offset
        a_at = A + (part * IN + inner[:, None]).to(tl.int64) * a_in + a_column
        first = (part + member) * R  # row of the factors: of PARTS and MEMBERS one is 1
        if COMPUTE_T:
            t = tl.zeros((BM, BR), tl.float32)
            v_at = V + (first + rank[None, :]).to(tl.int64) * IN + inner[:, None]
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
                if tile == 0:
                    store_t(T + first, t, rows, M, R, t_row, BR)
            c_first = C + first.to(tl.int64) * OUT
            acc = add_low_rank_tile(acc, t, S + first, c_first, columns, OUT, R, 0, LOW_PRECISION, BR)
    if not COMPUTE_T:
        first = member * R
        c_first = C + first.to(tl.int64) * OUT
        acc = add_low_rank(
            acc, T + first, S + first, c_first, rows, columns, M, OUT, PARTS * R, t_row, LOW_PRECISION, BR
        )
    store_y(Y0, Y1, Y2, Y3, BIAS, acc, rows, columns, member, M, OUT, MEMBERS, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def subspace_gemm_tma(
    x0_desc, x1_desc, x2_desc, x3_desc, a_desc, y_desc, T, S, V, C, BIAS, Y0, Y1, Y2, Y3,
    M, OUT, IN, R,
    t_row,
    MEMBERS: tl.constexpr, PARTS: tl.constexpr,
    HAS_BIAS: tl.constexpr, COMPUTE_T: tl.constexpr, STORE_T: tl.constexpr, A_IS_OUT_IN: tl.constexpr,
    PRECISION: tl.constexpr, LOW_PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """By tensor descriptors (the TMA of sm_90 and later): tiles of X, A and Y are moved by hardware, which needs rows
    that start at multiples of 16 bytes and pads what is outside with zeros.

    x0_desc ..: blocks [BM, BK] of X. a_desc: blocks [BN, BK] of the weight [MEMBERS OUT, IN] if A_IS_OUT_IN, else
    blocks [BK, BN] of [PARTS IN, OUT]. y_desc: blocks [BM, BN] of Y, used if MEMBERS is 1 (its tiles end at the last
    row of the matrix, not of a member). PARTS > 1 needs IN to be a multiple of BK. The rest as in
    :func:`subspace_gemm`.
    """
    tiles_out = tl.cdiv(OUT, BN)
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BM), MEMBERS * tiles_out, GROUP)
    member, tile = pid_n // tiles_out, pid_n % tiles_out
    row, column = pid_m * BM, tile * BN
    rows = row + tl.arange(0, BM)
    columns = column + tl.arange(0, BN)
    inner, rank = tl.arange(0, BK), tl.arange(0, BR)
    a_column = member * OUT + column
    acc = tl.zeros((BM, BN), tl.float32)
    for part in tl.static_range(PARTS):
        first = (part + member) * R  # row of the factors: of PARTS and MEMBERS one is 1
        if COMPUTE_T:
            t = tl.zeros((BM, BR), tl.float32)
            v_at = V + (first + rank[None, :]).to(tl.int64) * IN + inner[:, None]
        for k in range(0, IN, BK):
            if part == 0:
                x = x0_desc.load([row, k])
            elif part == 1:
                x = x1_desc.load([row, k])
            elif part == 2:
                x = x2_desc.load([row, k])
            else:
                x = x3_desc.load([row, k])
            if A_IS_OUT_IN:
                acc = tl.dot(x, a_desc.load([a_column, k]).T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(x, a_desc.load([part * IN + k, a_column]), acc, input_precision=PRECISION)
            if COMPUTE_T:
                v = tl.load(v_at, mask=(rank[None, :] < R) & (inner < IN - k)[:, None], other=0.0)
                t = tl.dot(x, v.to(x.dtype), t, input_precision=PRECISION)
                v_at += BK
        if COMPUTE_T:
            if STORE_T:
                if tile == 0:
                    store_t(T + first, t, rows, M, R, t_row, BR)
            c_first = C + first.to(tl.int64) * OUT
            acc = add_low_rank_tile(acc, t, S + first, c_first, columns, OUT, R, 0, LOW_PRECISION, BR)
    if not COMPUTE_T:
        first = member * R
        c_first = C + first.to(tl.int64) * OUT
        acc = add_low_rank(
            acc, T + first, S + first, c_first, rows, columns, M, OUT, PARTS * R, t_row, LOW_PRECISION, BR
        )
    if MEMBERS == 1:
        if HAS_BIAS:
            acc += tl.load(BIAS + columns, mask=columns < OUT, other=0.0).to(tl.float32)[None, :]
        y_desc.store([row, column], acc.to(y_desc.dtype))
    else:
        store_y(Y0, Y1, Y2, Y3, BIAS, acc, rows, columns, member, M, OUT, MEMBERS, HAS_BIAS)
