"""Products of a tall matrix Z [M, W] (x or dY) with the few rows of a factor, each bound by one reading of Z.

- ``skinny``: T = Z B^T, [M, R]: P = x v^T and Q = dY u^T.
- ``skinny_reduce``: G = T^T Z, [R, W]: dv (Z = x, T = Q) and du (Z = dY, T = P), in chunks of rows.
- ``skinny_both``: both from one reading, for Q and du (dY), and for ``weight`` in the penalty's two products.
- ``finish``: adds the chunks in order, times s, zeros for masked rows: du, dv, ds and dbias in one launch.

Sums are float32 and no atomics are used: results are the same bits in every run. In half precision T and the factor are
rounded to Z's dtype for the tensor cores; s is applied outside, in float32, so that small singular values keep their
precision.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def live_bits(MASK, R, OFFSETS: tl.constexpr, RP: tl.constexpr):
    """1 for the live rows of R, 0 for masked ones and beyond, int32 [RP].

    OFFSETS: K + 1 row bounds of the subspaces of one layer; the rows of several layers follow one another. MASK uint8
    [layers K].
    """
    rows = tl.arange(0, RP)
    row = rows % OFFSETS[len(OFFSETS) - 1]
    block = rows // OFFSETS[len(OFFSETS) - 1] * (len(OFFSETS) - 1)
    for k in tl.static_range(1, len(OFFSETS) - 1):
        block += (row >= OFFSETS[k]).to(tl.int32)
    return tl.load(MASK + block, mask=rows < R, other=0).to(tl.int32)


@triton.jit
def live_rows(MASK, R, first, OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr):
    """The index list of the live rows: (rows in slots first .. first + BR, number of live rows).

    Slots past the number of live rows hold row 0.
    """
    slots = first + tl.arange(0, BR)
    if HAS_MASK:
        every = tl.arange(0, RP)
        live = live_bits(MASK, R, OFFSETS, RP)
        position = tl.cumsum(live, 0) - live
        here = (position[None, :] == slots[:, None]) & (live[None, :] > 0)
        rows = tl.sum(tl.where(here, every[None, :], 0), 1)
        count = tl.sum(live, 0)
    else:
        rows = slots
        count = R
    return rows, count


@triton.jit(do_not_specialize=["M"])
def skinny(
    Z, B, T,
    M, W, R, z_row, t_row,
    PRECISION: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """T [M, R] float32 = Z [M, W] B[R, W]^T. Row strides z_row, t_row; B is contiguous. Grid: (tiles of M, of R)."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    rank = tl.program_id(1) * BR + tl.arange(0, BR)
    inner = tl.arange(0, BW)
    in_m, in_r = rows[:, None] < M, rank[None, :] < R
    z_at = Z + rows[:, None].to(tl.int64) * z_row + inner[None, :]
    b_at = B + rank[None, :].to(tl.int64) * W + inner[:, None]
    t = tl.zeros((BM, BR), tl.float32)
    for k in range(0, W, BW):
        if EVEN:
            z = tl.load(z_at, mask=in_m, other=0.0)
            b = tl.load(b_at, mask=in_r, other=0.0)
        else:
            left = inner < W - k
            z = tl.load(z_at, mask=in_m & left[None, :], other=0.0)
            b = tl.load(b_at, mask=in_r & left[:, None], other=0.0)
        t = tl.dot(z, b.to(z.dtype), t, input_precision=PRECISION)
        z_at += BW
        b_at += BW
    tl.store(T + rows[:, None].to(tl.int64) * t_row + rank[None, :], t, mask=in_m & in_r)


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def skinny_reduce(
    Z, T, P, G_PARTS, DS_PARTS, SUM_PARTS, MASK,
    M, W, R, z_row, t_row, g_rows, sum_row, chunk_rows,
    OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_DS: tl.constexpr, HAS_SUM: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """Per chunk of rows: G_PARTS [chunks, g_rows, W] = T^T Z, only the live rows, in the first slots of R.

    Z [M, W], row stride z_row; T, P [M, R] float32, row stride t_row. HAS_DS: DS_PARTS [chunks, R] = sum_m P * T.
    HAS_SUM: SUM_PARTS [chunks, W], row stride sum_row, = sum_m Z. Grid: (tiles of W, chunks, tiles of R). A tile of R
    without live rows reads nothing.
    """
    tile, chunk, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    columns = tile * BW + tl.arange(0, BW)
    slots = part * BR + tl.arange(0, BR)
    rank, count = live_rows(MASK, R, part * BR, OFFSETS, HAS_MASK, BR, RP)
    held = slots < count
    g = tl.zeros((BW, BR), tl.float32)
    ds = tl.zeros((BR,), tl.float32)
    total = tl.zeros((BW,), tl.float32)
    begin = chunk * chunk_rows
    end = min(M, begin + chunk_rows)
    if HAS_MASK and not HAS_SUM:
        end = tl.where(part * BR < count, end, begin)
    for m in range(begin, end, BM):
        rows = m + tl.arange(0, BM)
        inside = rows < end
        z = tl.load(
            Z + rows[:, None].to(tl.int64) * z_row + columns[None, :],
            mask=inside[:, None] & (columns[None, :] < W),
            other=0.0,
        )
        t_at = rows[:, None].to(tl.int64) * t_row + rank[None, :]
        wanted = inside[:, None] & held[None, :]
        t = tl.load(T + t_at, mask=wanted, other=0.0)
        g = tl.dot(tl.trans(z), t.to(z.dtype), g, input_precision=PRECISION)
        if HAS_DS:  # only by the programs of the first tile
            first = inside[:, None] & (rank[None, :] < tl.where(tile == 0, R, 0)) & held[None, :]
            ds += tl.sum(t * tl.load(P + t_at, mask=first, other=0.0), 0)
        if HAS_SUM:
            total += tl.sum(z.to(tl.float32), 0)
    g_at = G_PARTS + (chunk.to(tl.int64) * g_rows + slots[None, :]) * W + columns[:, None]
    tl.store(g_at, g, mask=held[None, :] & (columns[:, None] < W))
    if HAS_DS:
        if tile == 0:
            tl.store(DS_PARTS + chunk * R + slots, ds, mask=held)
    if HAS_SUM:
        if part == 0:
            tl.store(SUM_PARTS + chunk.to(tl.int64) * sum_row + columns, total, mask=columns < W)


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def skinny_both(
    Z, B, T, T_OUT, G_PARTS, SUM_PARTS, MASK,
    M, W, R, z_row, t_row, t_rank, g_rows, sum_row, chunk_rows,
    TABLE: tl.constexpr, DTYPE: tl.constexpr, OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr, BW: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """Both products from one reading of Z: parts of Z B^T over tiles of columns, and of T^T Z over chunks of rows.

    T_OUT [L, tiles, M, R] float32, G_PARTS [L, chunks, g_rows, W] float32 (live rows in the first slots), SUM_PARTS
    [chunks, W], row stride sum_row, = sum_m Z. R <= BR. L problems of one shape: B [L, R, W], T [L, M, R] float32 with
    strides (M * R, t_row, t_rank); TABLE: Z is an int64 [L] of addresses, multiples of 16, of matrices of type DTYPE,
    whose products are taken in float32, else L = 1 and Z is the matrix. Grid: (tiles of W, chunks, L).
    """
    tile, chunk, problem = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    columns = tile * BW + tl.arange(0, BW)
    rank = tl.arange(0, BR)
    in_w, in_r = columns < W, rank < R
    if TABLE:
        # the launcher guarantees it; without the hint every element would be loaded on its own
        z_base = tl.multiple_of(tl.load(Z + problem).to(tl.pointer_type(DTYPE)), 16)
    else:
        z_base = Z
    # [BW, BR], rounded before the loop: rounded inside, the tensor cores' operand would be stored again for each tile
    b = tl.load(
        B + (problem * R + rank[None, :]) * W + columns[:, None], mask=in_r[None, :] & in_w[:, None], other=0.0
    ).to(tl.float32 if TABLE else Z.dtype.element_ty)
    live, count = live_rows(MASK, R, 0, OFFSETS, HAS_MASK, BR, BR)
    held = rank < count
    g = tl.zeros((BW, BR), tl.float32)
    total = tl.zeros((BW,), tl.float32)
    begin = chunk * chunk_rows
    end = min(M, begin + chunk_rows)
    for m in range(begin, end, BM):
        rows = m + tl.arange(0, BM)
        inside = rows < end
        z = tl.load(
            z_base + rows[:, None].to(tl.int64) * z_row + columns[None, :],
            mask=inside[:, None] & in_w[None, :],
            other=0.0,
        )
        t = tl.load(
            T + problem * M * R + rows[:, None].to(tl.int64) * t_row + live[None, :] * t_rank,
            mask=inside[:, None] & held[None, :],
            other=0.0,
        )
        if TABLE:
            z = z.to(tl.float32)
        q = tl.dot(z, b, input_precision=PRECISION)
        q_at = ((problem * tl.num_programs(0) + tile) * M + rows[:, None]) * R + rank[None, :]
        tl.store(T_OUT + q_at, q, mask=inside[:, None] & in_r[None, :])
        g = tl.dot(tl.trans(z), t.to(z.dtype), g, input_precision=PRECISION)
        if HAS_SUM:
            total += tl.sum(z.to(tl.float32), 0)
    g_at = G_PARTS + ((problem * tl.num_programs(1) + chunk) * g_rows + rank[None, :]) * W + columns[:, None]
    tl.store(g_at, g, mask=held[None, :] & in_w[:, None])
    if HAS_SUM:
        tl.store(SUM_PARTS + chunk.to(tl.int64) * sum_row + columns, total, mask=in_w)


@triton.jit
def sum_of_chunks(PARTS, at, stride, chunks, mask, BW: tl.constexpr):
    """The sum over chunks of PARTS[chunk * stride + at], [BW], in a fixed order. 16 chunks are loaded at a time, so
    that loads overlap."""
    total = tl.zeros((BW,), tl.float32)
    for begin in range(0, chunks, 16):
        chunk = begin + tl.arange(0, 16)
        part = tl.load(
            PARTS + chunk[:, None].to(tl.int64) * stride + at[None, :],
            mask=(chunk[:, None] < chunks) & mask[None, :],
            other=0.0,
        )
        total += tl.sum(part, 0)
    return total


@triton.jit
def finish_rows(
    PARTS, OUT, S, MASK, program, W, R, member_rows, chunks,
    OFFSETS: tl.constexpr, HAS_MASK: tl.constexpr, BW: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """OUT [R, W], one row and BW columns of it: s * the sum of PARTS [chunks, R, W] over the chunks, in order. The
    slots of live rows begin anew every member_rows rows."""
    tiles = tl.cdiv(W, BW)
    row = program // tiles
    columns = (program % tiles) * BW + tl.arange(0, BW)
    slot, width = row, W
    if HAS_MASK:
        every = tl.arange(0, RP)
        bits = live_bits(MASK, R, OFFSETS, RP)
        first = row - row % member_rows
        slot = first + tl.sum(tl.where((every >= first) & (every < row), bits, 0), 0)
        width = W * tl.sum(tl.where(every == row, bits, 0), 0)  # a masked row reads nothing
    inside = columns < width
    total = sum_of_chunks(PARTS, slot.to(tl.int64) * W + columns, R * W, chunks, inside, BW)
    total *= tl.load(S + row).to(tl.float32)
    total = tl.where(inside, total, 0.0)  # for any s
    tl.store(OUT + row.to(tl.int64) * W + columns, total.to(OUT.dtype.element_ty), mask=columns < W)


@triton.jit(do_not_specialize=["du_chunks", "dv_chunks", "ds_chunks", "du_programs", "dv_programs"])
def finish(
    DU_PARTS, DV_PARTS, DS_PARTS, DB_PARTS, DU, DV, DS, DB, S, MASK,
    N, D, R, member_rows, db_columns, du_chunks, dv_chunks, ds_chunks, du_programs, dv_programs,
    HAS_DU: tl.constexpr, HAS_DV: tl.constexpr, HAS_DS: tl.constexpr, HAS_DB: tl.constexpr, OFFSETS: tl.constexpr,
    HAS_MASK: tl.constexpr, BW: tl.constexpr, RP: tl.constexpr,
):  # fmt: skip
    """du [R, N], dv [R, D], ds [R] and dbias [db_columns] from the sums of their chunks. du's live rows lie member by
    member, member_rows each, those of dv and ds one after another.

    Grid: du_programs = R * tiles of N (0 without du), dv_programs = R * tiles of D, one program for ds if it is
    needed, tiles of db_columns for dbias.
    """
    program = tl.program_id(0)
    if HAS_DU:
        if program < du_programs:
            finish_rows(DU_PARTS, DU, S, MASK, program, N, R, member_rows, du_chunks, OFFSETS, HAS_MASK, BW, RP)
    program -= du_programs
    if HAS_DV:
        if (program >= 0) & (program < dv_programs):
            finish_rows(DV_PARTS, DV, S, MASK, program, D, R, R, dv_chunks, OFFSETS, HAS_MASK, BW, RP)
    program -= dv_programs
    if HAS_DS:
        if program == 0:
            every = tl.arange(0, RP)
            inside = every < R
            slots = every
            if HAS_MASK:
                bits = live_bits(MASK, R, OFFSETS, RP)
                slots = tl.cumsum(bits, 0) - bits
                inside = inside & (bits > 0)
            total = sum_of_chunks(DS_PARTS, slots, R, ds_chunks, inside, RP)
            tl.store(DS + every, total.to(DS.dtype.element_ty), mask=every < R)
        program -= 1
    if HAS_DB:
        if program >= 0:
            columns = program * BW + tl.arange(0, BW)
            total = sum_of_chunks(DB_PARTS, columns, db_columns, du_chunks, columns < db_columns, BW)
            tl.store(DB + columns, total.to(DB.dtype.element_ty), mask=columns < db_columns)
