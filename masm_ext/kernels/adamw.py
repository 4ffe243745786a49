"""The kernels of masked_adamw.py: every block of a model in two launches.

Two, because nothing may be written before every gradient was checked. A segment [begin, end) of a parameter's elements
belongs to one block; a program takes one segment. The last program of a block to finish adds the sums of its segments
in order. No atomic adds floats, so results are the same bits in every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Types of parameters, as the bits of TYPES and, by their place, in the table of addresses.
F32, BF16, F16, F64 = 1, 2, 4, 8
#: Columns of the table of addresses, int64 [T, COLUMNS].
COLUMNS = tl.constexpr(7)  # param, grad, exp_avg, exp_avg_sq, penalty or 0, elements, type (its place in the above)


@triton.jit
def segment_of(SEGMENTS, TABLE, i, T, B):
    """(tensor, begin, end, block, whether it is valid) of segment i; nothing of an invalid one may be read."""
    tensor = tl.load(SEGMENTS + 4 * i)
    begin = tl.load(SEGMENTS + 4 * i + 1)
    end = tl.load(SEGMENTS + 4 * i + 2)
    block = tl.load(SEGMENTS + 4 * i + 3)
    inside = (tensor >= 0) & (tensor < T) & (block >= 0) & (block < B) & (begin >= 0) & (begin <= end)
    numel = tl.load(TABLE + tensor * COLUMNS + 5, mask=inside, other=-1)
    return tensor, begin, end, block, inside & (end <= numel)


@triton.jit
def address(TABLE, tensor, column: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(TABLE + tensor * COLUMNS + column).to(tl.pointer_type(DTYPE))


@triton.jit
def inspect(TABLE, tensor, begin, end, inverse, DTYPE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr):
    """(sum of the squares of a part of a gradient, 1 if one is not finite). Such a square would make a second moment
    infinite, which stops its element for good."""
    grad = address(TABLE, tensor, 1, DTYPE)
    total = tl.zeros((BLOCK,), tl.float64)
    bad = tl.zeros((BLOCK,), tl.int32)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        g = tl.load(grad + at, mask=at < end, other=0.0).to(F) * inverse.to(F)
        bad |= tl.where(g * g < float("inf"), 0, 1)  # also 1 for NaN
        wide = g.to(tl.float64)
        total += wide * wide
    return tl.sum(total, 0), tl.max(bad, 0)


@triton.jit
def root(x, F: tl.constexpr):
    return tl.sqrt_rn(x) if tl.float32 == F else tl.sqrt(x)


@triton.jit
def quotient(x, y, F: tl.constexpr):
    return tl.div_rn(x, y) if tl.float32 == F else x / y


@triton.jit
def update(
    TABLE, tensor, begin, end, inverse, decay, rate, beta1, beta2, correction2, step_size, eps,
    DTYPE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The AdamW step of a part of a parameter; the sum of gradient times first moment before it. Order of operations:
    csrc/math/adamw.h."""
    param, grad = address(TABLE, tensor, 0, DTYPE), address(TABLE, tensor, 1, DTYPE)
    first_moment, second_moment = address(TABLE, tensor, 2, F), address(TABLE, tensor, 3, F)
    penalty = address(TABLE, tensor, 4, F)
    penalized = tl.where(tl.load(TABLE + tensor * COLUMNS + 4) != 0, end, begin)  # end of the elements with a penalty
    one_minus_beta1, one_minus_beta2 = (1 - beta1).to(F), (1 - beta2).to(F)
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(begin, end, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < end
        p = tl.load(param + at, mask=inside, other=0.0).to(F)
        g = tl.load(grad + at, mask=inside, other=0.0).to(F) * inverse.to(F)
        m = tl.load(first_moment + at, mask=inside, other=0.0)
        v = tl.load(second_moment + at, mask=inside, other=0.0)
        e = tl.load(penalty + at, mask=at < penalized, other=0.0)
        total += g.to(tl.float64) * m.to(tl.float64)
        p = p * decay.to(F) - rate.to(F) * e
        m = m + one_minus_beta1 * (g - m)
        v = v * beta2.to(F) + one_minus_beta2 * g * g
        p = p - quotient(step_size.to(F) * m, quotient(root(v, F), correction2.to(F), F) + eps.to(F), F)
        tl.store(param + at, p.to(DTYPE), mask=inside)
        tl.store(first_moment + at, m, mask=inside)
        tl.store(second_moment + at, v, mask=inside)
    return tl.sum(total, 0)


@triton.jit
def power(base, exponent):
    """base^exponent for a float64 and an int64 >= 0, by squaring: Triton has no pow of its own."""
    result = base * 0 + 1
    while exponent > 0:
        result = tl.where(exponent & 1 == 1, result * base, result)
        base = base * base
        exponent = exponent >> 1
    return result


@triton.jit
def inspect_gradients(
    TABLE, SEGMENTS, MASK, GRAD_SCALE, FOUND_INF, POWER, CONTROL,
    T, S, B,
    HAS_SCALE: tl.constexpr, HAS_FOUND: tl.constexpr, TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """First launch. POWER float64 [S]: the sum of squares of each live segment. CONTROL int32 [1 + 4 B], zeros before:
    flags (bit 0: a gradient is not finite, bit 1: a segment or a mask is not valid); then per block the number of its
    live segments, the number of those done (second launch), and its first and last one (as S - i and i + 1; 0: none).
    Grid: max(S, 1)."""
    i = tl.program_id(0).to(tl.int64)
    flags = tl.zeros((), tl.int32)
    if i == 0:
        if HAS_FOUND:
            flags |= (tl.load(FOUND_INF) != 0).to(tl.int32)
        for first in range(0, B, BLOCK):
            at = first + tl.arange(0, BLOCK)
            mask = tl.load(MASK + at, mask=at < B, other=0.0)
            flags |= tl.max(tl.where((mask >= 0) & (mask <= 1), 0, 2), 0)
    if i < S:
        tensor, begin, end, block, valid = segment_of(SEGMENTS, TABLE, i, T, B)
        live = valid & (tl.load(MASK + block, mask=valid, other=0.0) != 0)
        flags |= tl.where(valid, 0, 2)
        if live:
            inverse = tl.full((), 1.0, tl.float64)
            if HAS_SCALE:
                inverse = 1.0 / tl.load(GRAD_SCALE).to(tl.float64)
            kind = tl.load(TABLE + tensor * COLUMNS + 6)
            total, bad = tl.zeros((), tl.float64), tl.zeros((), tl.int32)
            if TYPES & 1:
                if kind == 0:
                    total, bad = inspect(TABLE, tensor, begin, end, inverse, tl.float32, tl.float32, BLOCK)
            if TYPES & 2:
                if kind == 1:
                    total, bad = inspect(TABLE, tensor, begin, end, inverse, tl.bfloat16, tl.float32, BLOCK)
            if TYPES & 4:
                if kind == 2:
                    total, bad = inspect(TABLE, tensor, begin, end, inverse, tl.float16, tl.float32, BLOCK)
            if TYPES & 8:
                if kind == 3:
                    total, bad = inspect(TABLE, tensor, begin, end, inverse, tl.float64, tl.float64, BLOCK)
            flags |= bad
            tl.store(POWER + i, total)
            tl.atomic_add(CONTROL + 1 + block, 1)
            tl.atomic_max(CONTROL + 1 + 2 * B + block, (S - i).to(tl.int32))
            tl.atomic_max(CONTROL + 1 + 3 * B + block, (i + 1).to(tl.int32))
    if flags != 0:
        tl.atomic_or(CONTROL, flags)


@triton.jit
def update_segments(
    TABLE, SEGMENTS, MASK, HYPER, STEPS, GRAD_SCALE, POWER, SIGNAL, STATS, FOUND, CONTROL,
    T, S, B,
    HAS_SCALE: tl.constexpr, TYPES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Second launch. SIGNAL float64 [S] is workspace; STATS float64 [B, 2], zeros before, FOUND float32 [1]: as
    masm::masked_adamw_ returns them. Grid: max(S, 1). Segments go in reverse order: the gradients read last are still
    in the L2 cache."""
    i = S - 1 - tl.program_id(0).to(tl.int64)
    flags = tl.load(CONTROL)
    if tl.program_id(0) == 0:
        tl.store(FOUND, tl.where(flags & 2 != 0, 2.0, tl.where(flags != 0, 1.0, 0.0)))
    if (flags == 0) & (i >= 0):
        tensor, begin, end, block, _ = segment_of(SEGMENTS, TABLE, i, T, B)
        mask = tl.load(MASK + block).to(tl.float64)
        if mask != 0:
            inverse = tl.full((), 1.0, tl.float64)
            if HAS_SCALE:
                inverse = 1.0 / tl.load(GRAD_SCALE).to(tl.float64)
            lr, beta1 = tl.load(HYPER + 5 * tensor), tl.load(HYPER + 5 * tensor + 1)
            beta2, eps = tl.load(HYPER + 5 * tensor + 2), tl.load(HYPER + 5 * tensor + 3)
            decay = 1 - mask * lr * tl.load(HYPER + 5 * tensor + 4)
            before = tl.load(STEPS + block)  # steps
            shrunk = power(beta1, before)
            earlier = 1 - shrunk
            step_size = mask * lr / (1 - shrunk * beta1)
            correction2 = tl.sqrt(1 - power(beta2, before + 1))
            rate = mask * lr
            kind = tl.load(TABLE + tensor * COLUMNS + 6)
            signal = tl.zeros((), tl.float64)
            if TYPES & 1:
                if kind == 0:
                    signal = update(
                        TABLE, tensor, begin, end, inverse, decay, rate, beta1, beta2, correction2, step_size, eps,
                        tl.float32, tl.float32, BLOCK,
                    )  # fmt: skip
            if TYPES & 2:
                if kind == 1:
                    signal = update(
                        TABLE, tensor, begin, end, inverse, decay, rate, beta1, beta2, correction2, step_size, eps,
                        tl.bfloat16, tl.float32, BLOCK,
                    )  # fmt: skip
            if TYPES & 4:
                if kind == 2:
                    signal = update(
                        TABLE, tensor, begin, end, inverse, decay, rate, beta1, beta2, correction2, step_size, eps,
                        tl.float16, tl.float32, BLOCK,
                    )  # fmt: skip
            if TYPES & 8:
                if kind == 3:
                    signal = update(
                        TABLE, tensor, begin, end, inverse, decay, rate, beta1, beta2, correction2, step_size, eps,
                        tl.float64, tl.float64, BLOCK,
                    )  # fmt: skip
            # before the first step there is no first moment: the block has no statistics yet
            has_earlier = before > 0
            tl.store(SIGNAL + i, tl.where(has_earlier, signal / tl.where(has_earlier, earlier, 1.0), 0.0))
            tl.debug_barrier()  # this program's stores come before its count
            done = tl.atomic_add(CONTROL + 1 + B + block, 1, sem="acq_rel")
            tl.debug_barrier()  # its reads come after the counts of the others
            if done == tl.load(CONTROL + 1 + block) - 1:
                first = S - tl.load(CONTROL + 1 + 2 * B + block)
                last = tl.load(CONTROL + 1 + 3 * B + block)
                statistics = tl.where(has_earlier, last, first)
                sums = tl.zeros((32,), tl.float64)
                powers = tl.zeros((32,), tl.float64)
                for begin_ in range(first, last, 32):
                    at = begin_ + tl.arange(0, 32).to(tl.int64)
                    own = (at < last) & (tl.load(SEGMENTS + 4 * at + 3, mask=at < last, other=-1) == block)
                    sums += tl.load(SIGNAL + at, mask=own, other=0.0, cache_modifier=".cg")
                    powers += tl.load(POWER + at, mask=own & (at < statistics), other=0.0, cache_modifier=".cg")
                tl.store(STATS + 2 * block, tl.sum(sums, 0))
                tl.store(STATS + 2 * block + 1, tl.sum(powers, 0))
                tl.store(STEPS + block, before + 1)
