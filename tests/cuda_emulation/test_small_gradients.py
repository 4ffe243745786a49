"""The kernel of csrc/cuda/small_gradients.cuh on the CPU, through the code that launches it, against float64."""

import itertools

import pytest
import torch
from emulated import DTYPES, call
from test_stream_linear import KINDS, at
from tolerances import GRADIENT, relative_error

from masm_ext import reference

NAMES = ("du", "dv", "ds", "dbias")


class Backward:
    """J layers on one x. ranks: of the subspaces of each."""

    def __init__(self, M, N, D, ranks, kind=KINDS[0], J=1, mask=None, gap=0, shift=0):
        dtype, factor = kind
        R = sum(ranks)
        self.sizes, self.kind, self.ranks = (J, M, N, D, R), kind, ranks
        self.offsets = [0, *itertools.accumulate(ranks)]
        self.dy = [at((M, N), dtype, N + gap, shift) for _ in range(J)]
        self.x = at((M, D), dtype, D + gap, shift)
        self.weight, self.u, self.v = torch.zeros(N, D), torch.zeros(R, N), torch.zeros(R, D)
        self.s = at((J * R,), factor)
        self.p, self.q = at((M, J * R), torch.float32, J * R + gap), at((M, J * R), torch.float32)
        self.mask = None if mask is None else [torch.tensor(bits, dtype=torch.bool) for bits in mask]

    def emulate(self, emulated, seed, needs=NAMES):
        J, _, N, D, R = self.sizes
        dtype, factor = self.kind
        sizes = {"du": (J * R, N), "dv": (J * R, D), "ds": (J * R,), "dbias": (J * N,)}
        out = {n: torch.full(sizes[n], torch.nan).to(dtype if n == "dbias" else factor) for n in needs}
        subspace = torch.tensor([k for k, r in enumerate(self.ranks) for _ in range(r)], dtype=torch.int32)
        rows = torch.tensor([t.stride(0) for t in (self.dy[0], self.x, self.p, self.q)])
        masks = torch.tensor([0 if self.mask is None else self.mask[j].data_ptr() for j in range(J)])
        call(
            emulated("small_gradients").small_gradients, torch.tensor([t.data_ptr() for t in self.dy]), masks,
            torch.tensor(self.sizes), self.x, self.s, self.p, self.q, *(out.get(n) for n in NAMES), rows, subspace,
            *(DTYPES[d] for d in self.kind), seed % 2**31,
        )  # fmt: skip
        return out

    def check(self, out):
        J, _, N, _, R = self.sizes
        for j in range(J):
            here = slice(j * R, (j + 1) * R)
            dy, x, s, p, q = (t.double() for t in (self.dy[j], self.x, self.s[here], self.p[:, here], self.q[:, here]))
            want = {"du": (p * s).mT @ dy, "dv": (q * s).mT @ x, "ds": (p * q).sum(0), "dbias": dy.sum(0)}
            live = torch.ones(R, dtype=torch.bool)
            if self.mask is not None:
                live = self.mask[j].repeat_interleave(torch.tensor(self.ranks))
            for name, got in out.items():
                got = got[j * N : (j + 1) * N] if name == "dbias" else got[here]
                if name != "dbias":
                    assert not got[~live].any(), name  # zeros, and no NaN
                    want[name][~live] = 0
                if name == "ds":  # may cancel: held against its terms
                    terms = (p * q).abs().sum(0)[live].norm()
                    assert float((got.double() - want[name]).norm()) <= GRADIENT[got.dtype] * float(terms)
                else:
                    assert relative_error(got, want[name]) <= GRADIENT[got.dtype], name


def test_the_formula_here_is_the_reference():
    """`check` does not recompute Q, which the kernel is given."""
    M, N, D, R = 5, 6, 7, 3
    dy, x, weight, u, s, v = (torch.randn(n, dtype=torch.float64) for n in ((M, N), (M, D), (N, D), (R, N), R, (R, D)))
    p, q = x @ v.mT, dy @ u.mT
    _, du, ds, dv, db = reference.subspace_linear_backward(dy, x, weight, u, s, v, p, None, [0, R])
    for got, want in ((du, (p * s).mT @ dy), (dv, (q * s).mT @ x), (ds, (p * q).sum(0)), (db, dy.sum(0))):
        assert relative_error(got, want) <= 1e-14


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(str(t).removeprefix("torch.") for t in k))
@pytest.mark.parametrize(
    "M,N,D,ranks",
    [(1, 8, 40, (1,)), (2, 33, 16, (7,)), (16, 40, 72, (9, 7)), (17, 5, 7, (3, 0, 14)), (64, 24, 96, (64,))],
)
def test_matches_the_formula(kind, M, N, D, ranks, emulated, seed):
    case = Backward(M, N, D, ranks, kind)
    case.check(case.emulate(emulated, seed))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("bits", [(0, 0, 0), (1, 0, 1), (0, 1, 0)], ids=str)
def test_masked_rows_are_zeros_whatever_the_numbers(kind, bits, emulated, seed):
    case = Backward(20, 40, 24, (5, 17, 3), kind, mask=[bits])
    dead = ~case.mask[0].repeat_interleave(torch.tensor(case.ranks))
    case.p[:, dead], case.q[:, dead] = torch.nan, torch.inf
    out = case.emulate(emulated, seed)
    case.p[:, dead], case.q[:, dead] = 0, 0
    case.check(out)


def test_where_all_are_masked_nothing_is_read(emulated, seed):
    """Numbers that would show: dv and ds from x, P and Q full of NaN. dbias still wants dY."""
    case = Backward(20, 40, 24, (5, 17), mask=[(0, 0)])
    for t in (case.x, case.p, case.q):
        t.fill_(torch.nan)
    case.check(case.emulate(emulated, seed))


@pytest.mark.parametrize("needs", [n for k in range(1, 5) for n in itertools.combinations(NAMES, k)], ids="-".join)
def test_only_what_is_needed(needs, emulated, seed):
    case = Backward(9, 40, 24, (18,), mask=[(1,)])
    unread = {"dy": ("du", "dbias"), "x": ("dv",), "p": ("du", "ds"), "q": ("dv", "ds")}
    for name, users in unread.items():
        if not set(users) & set(needs):
            for t in case.dy if name == "dy" else [getattr(case, name)]:
                t.fill_(torch.nan)
    case.check(case.emulate(emulated, seed, needs))


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("J", [2, 4])
def test_groups(kind, J, emulated, seed):
    case = Backward(18, 40, 24, (4, 2), kind, J, mask=[(1, 0), (0, 0), (1, 1), (0, 1)][:J])
    case.check(case.emulate(emulated, seed))


@pytest.mark.parametrize("gap,shift", [(8, 0), (3, 0), (0, 1)])
def test_rows_anywhere(gap, shift, emulated, seed):
    for kind in (KINDS[0], KINDS[4]):
        case = Backward(18, 40, 24, (6,), kind, gap=gap, shift=shift)
        case.check(case.emulate(emulated, seed))


@pytest.mark.parametrize("M,N,D,R", [(0, 8, 16, 2), (3, 0, 16, 2), (3, 8, 0, 2), (3, 8, 16, 0)])
def test_empty(M, N, D, R, emulated, seed):
    for kind in (KINDS[0], KINDS[4]):
        case = Backward(M, N, D, (R,), kind)
        case.check(case.emulate(emulated, seed))


def test_many_rows_and_directions(emulated, seed):
    """More rows than a block has in flight, and the most directions."""
    case = Backward(70, 8, 8, (200, 56), mask=[(1, 0)])
    case.check(case.emulate(emulated, seed))


def test_the_order_of_threads_changes_no_bit(emulated):
    case = Backward(20, 40, 24, (17,), J=2)
    first = case.emulate(emulated, 0)
    for seed in range(1, 4):
        assert all(torch.equal(t, first[name]) for name, t in case.emulate(emulated, seed).items())
