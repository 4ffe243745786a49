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


class Layers:
    """J layers on one x. x_gap, weight_gap: elements between rows."""

    def __init__(self, M, N, D, R, kind=KINDS[0], J=1, bias=True, x_gap=0, weight_gap=0):
        dtype, factor = kind
        self.sizes, self.kind = (J, M, N, D, R), kind
        self.x = at((M, D), dtype, D + x_gap)
        self.weight = [at((N, D), dtype, D + weight_gap) for _ in range(J)]
        self.u = [at((R, N), factor) for _ in range(J)]
        self.s = [at((R,), factor) for _ in range(J)]
        self.v = [at((R, D), factor) for _ in range(J)]
        self.bias = [at((N,), dtype) for _ in range(J)] if bias else [None] * J

    def lists(self):
        return self.weight, self.u, self.s, self.v, self.bias

    def emulate(self, emulated, seed, processors=3, p_first=0):
        """y J x [M, N] and P [M, J R]; p_first: as where launches overlap, P in one of its own."""
        J, M, N, _, R = self.sizes
        ys = [torch.full((M, N), torch.nan).to(self.kind[0]) for _ in range(J)]
        p_row = J * R + 2  # as columns of a wider matrix
        whole = torch.full((max(M, 1), p_row), torch.nan)
        rows = zip(*self.lists(), ys)
        addresses = torch.tensor([[0 if t is None else t.data_ptr() for t in row] for row in rows])
        types = [DTYPES[d] for d in self.kind]
        call(
            emulated("stream_linear").stream_linear, addresses, torch.tensor(self.sizes), self.x, whole[:, 1:],
            self.x.stride(0), self.weight[0].stride(0), p_row, *types, processors, p_first, seed % 2**31,
        )  # fmt: skip
        assert whole[:, [0, -1]].isnan().all()
        return ys, whole[:M, 1:-1]

    def check(self, ys, p):
        R = self.sizes[-1]
        for j, (weight, u, s, v, bias) in enumerate(zip(*self.lists())):
            rounded = v.to(self.kind[0])  # as every strategy takes it
            wide = [None if t is None else t.double() for t in (self.x, weight, u, s, rounded, bias)]
            y, want_p = reference.subspace_linear(*wide)
            terms = reference.subspace_linear(*(None if t is None else t.abs() for t in wide))
            assert close(ys[j], y, terms[0], self.kind[0])
            assert close(p[:, j * R : (j + 1) * R], want_p, terms[1])


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(str(t).removeprefix("torch.") for t in k))
@pytest.mark.parametrize(
    "M,N,D,R", [(1, 8, 64, 1), (2, 13, 40, 7), (16, 40, 304, 16), (17, 24, 264, 17), (64, 19, 104, 64), (33, 5, 8, 3)]
)
def test_matches_the_formula(kind, M, N, D, R, emulated, seed):
    layers = Layers(M, N, D, R, kind)
    ys, p = layers.emulate(emulated, seed)
    layers.check(ys, p)
    twice = layers.emulate(emulated, seed, p_first=1)
    assert torch.equal(twice[0][0], ys[0]) and torch.equal(twice[1], p)  # P in a launch of its own: the same sums


@pytest.mark.parametrize("processors", [1, 2, 132])
def test_tiles_of_a_block(processors, emulated, seed):
    """One block walks all tiles several at a time, or takes one."""
    for M, p_first in ((3, 0), (40, 1), (40, 0)):
        layers = Layers(M, 51, 72, 20)
        layers.check(*layers.emulate(emulated, seed, processors, p_first))


@pytest.mark.parametrize("kind", KINDS[:2], ids=["float32 factors", "bfloat16 factors"])
def test_rows_apart(kind, emulated, seed):
    layers = Layers(18, 12, 80, 5, kind, x_gap=8, weight_gap=16)
    layers.check(*layers.emulate(emulated, seed))


@pytest.mark.parametrize("J", [2, 3, 4])
def test_groups(J, emulated, seed):
    layers = Layers(9, 20, 48, 6, J=J)
    for p_first in (0, 1):
        layers.check(*layers.emulate(emulated, seed, 4, p_first))


@pytest.mark.parametrize("M,N,D,R", [(0, 8, 16, 2), (3, 0, 16, 2), (3, 8, 0, 2), (3, 8, 16, 0), (3, 0, 16, 0)])
def test_empty(M, N, D, R, emulated, seed):
    layers = Layers(M, N, D, R)
    for p_first in (0, 1):
        layers.check(*layers.emulate(emulated, seed, p_first=p_first))


def test_without_bias(emulated, seed):
    layers = Layers(5, 16, 64, 4, bias=False)
    layers.check(*layers.emulate(emulated, seed))


def test_a_large_v_is_read_once(emulated, seed):
    """More than a block may read for itself, without overlapping launches."""
    layers = Layers(2, 8, 2056, 16)
    layers.check(*layers.emulate(emulated, seed))


def test_the_order_of_threads_changes_no_bit(emulated):
    layers = Layers(20, 24, 136, 9, J=2)
    first = layers.emulate(emulated, 0)
    for seed in range(1, 4):
        ys, p = layers.emulate(emulated, seed)
        assert all(map(torch.equal, ys, first[0])) and torch.equal(p, first[1])


def test_low_rank_part_is_not_rounded(emulated, seed):
    """y is rounded once: with a weight of zeros it is the rounded low-rank part, which keeps P and u in float32."""
    layers = Layers(16, 16, 64, 8)
    layers.weight[0].zero_()
    ys, _ = layers.emulate(emulated, seed)
    wide = [t.double() for t in (layers.x, layers.weight[0], layers.u[0], layers.s[0], layers.v[0].bfloat16())]
    y, _ = reference.subspace_linear(*wide, layers.bias[0].double())
    off = (ys[0] != y.to(torch.bfloat16)).double().mean()
    assert off <= 0.02  # where a sum in float32 lies on the other side of a half


def test_not_a_number_is_passed_on(emulated, seed):
    layers = Layers(17, 12, 40, 3)
    layers.x[4, 33] = torch.nan
    ys, p = layers.emulate(emulated, seed)
    for out in (ys[0], p):
        assert out[4].isnan().all() and not out[[*range(4), *range(5, 17)]].isnan().any()
