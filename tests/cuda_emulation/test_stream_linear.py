"""The kernel of csrc/cuda/stream_linear.cuh on the CPU, through the code that launches it, against float64."""

import pytest
import torch
from emulated import DTYPES, call
from tolerances import RELATIVE

from masm_ext import reference

KINDS = [
    (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32),
    (torch.float16, torch.float16),
]  # fmt: skip


def at(size, dtype, row=None):
    """Random numbers [.., columns] with rows `row` elements apart. The memory ends with the last row, which the address
    sanitizer watches."""
    *lead, columns = size
    row = columns if row is None else row
    rows = lead[0] if lead else 1
    numbers = torch.randn(max(0, (rows - 1) * row + columns), dtype=torch.float64).to(dtype)
    return numbers.as_strided(size, (row, 1)[-len(size) :])


def close(got, want, terms, dtype=torch.float32):
    """A float32 sum, held against the sum of its terms, for it may cancel; rounded once to half precision."""
    rounding = 0.0 if dtype == torch.float32 else RELATIVE[dtype] * float(want.norm())
    return float((got.double() - want).norm()) <= rounding + RELATIVE[torch.float32] * float(terms.norm())


class Layer:
    """x_gap, weight_gap: elements between rows."""

    def __init__(self, M, N, D, R, kind=KINDS[0], bias=True, x_gap=0, weight_gap=0):
        dtype, factor = kind
        self.sizes, self.kind = (M, N, D, R), kind
        self.x, self.weight = at((M, D), dtype, D + x_gap), at((N, D), dtype, D + weight_gap)
        self.u, self.s, self.v = at((R, N), factor), at((R,), factor), at((R, D), factor)
        self.bias = at((N,), dtype) if bias else None

    def emulate(self, emulated, seed, processors=3, p_first=0):
        """y [M, N] and P [M, R]; p_first: P in a launch of its own."""
        M, N, _, R = self.sizes
        y, p = torch.full((M, N), torch.nan).to(self.kind[0]), torch.full((M, R), torch.nan)
        sizes = torch.tensor([*self.sizes, self.x.stride(0), self.weight.stride(0)])
        operands = (self.x, self.weight, self.u, self.s, self.v, self.bias, y, p)
        types = [DTYPES[d] for d in self.kind]
        call(emulated("stream_linear").stream_linear, sizes, *operands, *types, processors, p_first, seed % 2**31)
        return y, p

    def wide(self):
        """The operands in float64, v rounded as every strategy takes it."""
        operands = (self.x, self.weight, self.u, self.s, self.v.to(self.kind[0]), self.bias)
        return [None if t is None else t.double() for t in operands]

    def check(self, y, p):
        want, want_p = reference.subspace_linear(*self.wide())
        terms, terms_p = reference.subspace_linear(*(None if t is None else t.abs() for t in self.wide()))
        assert close(y, want, terms, self.kind[0]) and close(p, want_p, terms_p)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(str(t).removeprefix("torch.") for t in k))
@pytest.mark.parametrize(
    "M,N,D,R", [(1, 8, 64, 1), (2, 13, 40, 7), (16, 40, 304, 16), (17, 24, 264, 17), (64, 19, 104, 64), (33, 5, 8, 3)]
)
def test_matches_the_formula(kind, M, N, D, R, emulated, seed):
    layer = Layer(M, N, D, R, kind)
    y, p = layer.emulate(emulated, seed)
    layer.check(y, p)
    twice = layer.emulate(emulated, seed, p_first=1)
    assert torch.equal(twice[0], y) and torch.equal(twice[1], p)  # P in a launch of its own: the same sums


@pytest.mark.parametrize("processors", [1, 2, 132])
def test_tiles_of_a_block(processors, emulated, seed):
    """One block takes all tiles, several at a time, or only one."""
    for M, p_first in ((3, 0), (40, 1), (40, 0)):
        layer = Layer(M, 51, 72, 20)
        layer.check(*layer.emulate(emulated, seed, processors, p_first))


@pytest.mark.parametrize("kind", KINDS[:2], ids=["float32 factors", "bfloat16 factors"])
def test_rows_apart(kind, emulated, seed):
    layer = Layer(18, 12, 80, 5, kind, x_gap=8, weight_gap=16)
    layer.check(*layer.emulate(emulated, seed))


@pytest.mark.parametrize("M,N,D,R", [(0, 8, 16, 2), (3, 0, 16, 2), (3, 8, 0, 2), (3, 8, 16, 0), (3, 0, 16, 0)])
def test_empty(M, N, D, R, emulated, seed):
    layer = Layer(M, N, D, R)
    for p_first in (0, 1):
        layer.check(*layer.emulate(emulated, seed, p_first=p_first))


def test_without_bias(emulated, seed):
    layer = Layer(5, 16, 64, 4, bias=False)
    layer.check(*layer.emulate(emulated, seed))


def test_a_large_v_is_read_once(emulated, seed):
    """v is larger than each block may read."""
    layer = Layer(2, 8, 2056, 16)
    layer.check(*layer.emulate(emulated, seed))


def test_the_order_of_threads_changes_no_bit(emulated):
    layer = Layer(20, 24, 136, 9)
    first = layer.emulate(emulated, 0)
    for seed in range(1, 4):
        assert all(map(torch.equal, layer.emulate(emulated, seed), first))


def test_low_rank_part_is_not_rounded(emulated, seed):
    """y is rounded once: with a weight of zeros it is the rounded low-rank part, which keeps P and u in float32."""
    layer = Layer(16, 16, 64, 8)
    layer.weight.zero_()
    y, _ = layer.emulate(emulated, seed)
    want, _ = reference.subspace_linear(*layer.wide())
    off = (y != want.to(torch.bfloat16)).double().mean()
    assert off <= 0.02  # where a sum in float32 lies on the other side of a half


def test_not_a_number_is_passed_on(emulated, seed):
    layer = Layer(17, 12, 40, 3)
    layer.x[4, 33] = torch.nan
    for out in layer.emulate(emulated, seed):
        assert out[4].isnan().all() and not out[[*range(4), *range(5, 17)]].isnan().any()
