"""Strategy `stream` from the op's CUDA home down: the Python code that launches its kernels, which run emulated."""

import re

import pytest
import torch
from emulated import DTYPES, SOURCES, call
from tolerances import GRADIENT, RELATIVE, relative_error

pytest.importorskip("triton", reason="the home of the op on CUDA imports Triton, which is not installed here")

from masm_ext import reference
from masm_ext.kernels import small_batch, subspace_linear, tape
from masm_ext.kernels.launch import Target
from masm_ext.ops import homes

GPU = Target(90, 3)
#: Of the ops that csrc/cuda/small_batch.cpp registers.
SCHEMAS = [
    "".join(re.findall(r'"(.*?)"', definition))
    for definition in re.findall(r"m\.def\((.*?)\);", (SOURCES / "cuda/small_batch.cpp").read_text(), re.S)
]


class Emulated:
    """The ops of csrc/cuda/small_batch.cpp: what they check of strides and sizes, and the kernels. ``ops``: as torch
    ops, which is how they are called, and what a tape sees of them."""

    def __init__(self, emulated, seed):
        self.emulated, self.seed, self.launches = emulated, seed % 2**31, []
        self.library = torch.library.Library("masm_emulated", "FRAGMENT")
        for schema in SCHEMAS:
            name = self.library.define(schema)
            self.library.impl(name, getattr(self, name), "CPU")
        self.ops = torch.ops.masm_emulated

    def stream(self, x, weight, u, s, v, bias, y, p, only_p):
        J, (M, D), R = len(v), x[0].shape, v[0].shape[0]
        N = 0 if only_p else weight[0].shape[0]
        rows = [[0 if t is None else t.data_ptr() for t in row] for row in zip(x, weight, u, s, v, bias, y)]
        self.check(x)
        assert all(t is None or t.is_contiguous() for ts in (u, s, v, bias, y) for t in ts)
        weight_row = 0 if only_p else self.check(weight)
        types, sizes = [DTYPES[t.dtype] for t in (x[0], v[0])], torch.tensor([J, M, N, D, R])
        call(
            self.emulated("stream_linear").stream_linear, torch.tensor(rows), sizes, int(only_p), p, x[0].stride(0),
            weight_row, p.stride(0), *types, GPU.processors, self.seed % 2, self.seed,
        )  # fmt: skip

    @staticmethod
    def check(matrices):
        assert all(t.stride(1) == 1 and t.stride(0) == matrices[0].stride(0) for t in matrices)
        return matrices[0].stride(0)

    def stream_linear(self, x, weight, u, s, v, bias, y, p):
        self.launches.append("stream_linear")
        J = len(weight)
        self.stream(J * [x], weight, u, s, v, bias or J * [None], y, p, False)

    def stream_product(self, z, b, p):
        self.launches.append("stream_product")
        none = len(z) * [None]
        self.stream(z, none, none, none, b, none, none, p, True)

    def small_gradients(self, dy, x, s, p, q, mask, offsets, du, dv, ds, dbias):
        self.launches.append("small_gradients")
        J, (M, N), D, R = len(dy), dy[0].shape, x.shape[1], s.shape[0] // len(dy)
        assert p is not None or (du is None and ds is None)
        assert q is not None or (dv is None and ds is None)
        assert all(t is None or t.is_contiguous() for t in (s, du, dv, ds, dbias, *mask))
        subspace = [k for k in range(len(offsets) - 1) for _ in range(offsets[k], offsets[k + 1])]
        rows = [self.check(dy), x.stride(0), *(0 if t is None else t.stride(0) for t in (p, q))]
        addresses = [torch.tensor([t.data_ptr() for t in ts] or J * [0]) for ts in (dy, mask)]
        types = [DTYPES[t.dtype] for t in (dy[0], s)]
        call(
            self.emulated("small_gradients").small_gradients, *addresses, torch.tensor([J, M, N, D, R]), x, s, p, q,
            du, dv, ds, dbias, torch.tensor(rows), torch.tensor(subspace, dtype=torch.int32), *types, self.seed,
        )  # fmt: skip


@pytest.fixture
def ops(emulated, seed, monkeypatch):
    """dX is a Triton kernel's (tests/interpreter): here the formula, which writes Q as that kernel does."""

    def input_gradient(dys, weight, factor, q, strategy, target, tile):
        assert strategy == homes.SINGLE
        layers, dx = len(dys), 0
        R, N = factor.s.shape[0] // layers, dys[0].shape[1]
        for j, dy in enumerate(dys):
            here = slice(j * R, (j + 1) * R)
            q_j = dy.double() @ factor.v[here].double().mT
            dx = (
                dx
                + dy.double() @ weight[j * N : (j + 1) * N].double()
                + (q_j * factor.s[here]) @ factor.c[here].double()
            )
            if q is not None:
                q[:, here] = q_j
        return dx.to(dys[0].dtype)

    ops = Emulated(emulated, seed)
    monkeypatch.setattr(small_batch, "OPS", ops.ops)
    monkeypatch.setattr(small_batch, "available", lambda t: True)
    monkeypatch.setattr(subspace_linear, "input_gradient", input_gradient)
    tape.forget()  # what earlier tests recorded calls ops that are gone
    yield ops
    tape.forget()
    ops.library._destroy()


def draw(lead, N, D, R, J=1, dtype=torch.bfloat16, factor=torch.float32):
    def layers(*size, to=factor):
        return [torch.randn(size, dtype=torch.float64).to(to) for _ in range(J)]

    weight, u, s, v = layers(N, D, to=dtype), layers(R, N), layers(R), layers(R, D)
    dy = [torch.randn(*lead, N).to(dtype) for _ in range(J)]
    return torch.randn(*lead, D).to(dtype), weight, u, s, v, layers(N, to=dtype), dy


def run(x, weight, u, s, v, bias, dy, mask, offsets, needs, strategy="stream"):
    y, p = subspace_linear.subspace_linear_group(x, weight, u, s, v, bias, mask, offsets, True, strategy, GPU)
    p = p if needs[1] or needs[2] else p.new_empty(0)  # else autograd has not kept it
    grads = subspace_linear.subspace_linear_group_backward(
        dy, x, weight, u, s, v, p, mask, offsets, *needs, strategy, GPU
    )
    return y, grads


def check(x, weight, u, s, v, bias, dy, mask, offsets, needs, got):
    dtype = x.dtype
    wide = [[t.double() for t in ts] for ts in (weight, u, s, [t.to(dtype) for t in v])]
    y, p = reference.subspace_linear_group(x.double(), *wide, [t.double() for t in bias], mask, offsets)
    want = reference.subspace_linear_group_backward(
        [t.double() for t in dy], x.double(), *wide, p, mask, offsets, *needs
    )
    for a, b in zip(got[0], y):
        assert a.dtype == dtype and relative_error(a, b) <= RELATIVE[dtype]
    for name, a, b in zip(("dx", "du", "ds", "dv", "dbias"), got[1], want):
        loose = 10 if name == "ds" else 1  # may cancel
        assert a.shape == b.shape and relative_error(a, b) <= loose * GRADIENT[dtype], name


@pytest.mark.parametrize("J", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_gradients(J, dtype, ops):
    for lead in ((3, 4), (18,)):
        case = draw(lead, 24, 40, 6, J, dtype)
        mask = [torch.tensor([True, False, True]) for _ in range(J)]
        rest = (mask, [0, 2, 3, 6], (True,) * 5)
        check(*case, *rest, run(*case, *rest))
    assert ops.launches == 2 * ["stream_linear", "small_gradients"]  # and dX


@pytest.mark.parametrize("J", [1, 3])
def test_repeated_calls_are_played(J, ops, monkeypatch):
    """The third call and every later one, each with inputs of its own: other values at other addresses."""
    played = []
    play = tape.Tape.play
    monkeypatch.setattr(tape.Tape, "play", lambda self, inputs: played.append(1) or play(self, inputs))
    for i in range(4):
        case = draw((18,), 24, 40, 6, J)
        mask = [torch.rand(3) < 0.5 for _ in range(J)]
        rest = (mask, [0, 2, 3, 6], (True,) * 5)
        check(*case, *rest, run(*case, *rest))
        assert ops.launches == (i + 1) * ["stream_linear", "small_gradients"]
        assert len(played) == 2 * max(0, i - 1)


@pytest.mark.parametrize("bits", range(32))
def test_gradients_that_are_needed(bits, ops):
    needs = tuple(bool(bits >> i & 1) for i in range(5))
    case = draw((9,), 16, 24, 4, 2)
    rest = ([], [0, 4], needs)
    check(*case, *rest, run(*case, *rest))
    alone = not needs[0] and (needs[2] or needs[3])
    assert ops.launches == [
        "stream_linear", *alone * ["stream_product"], *any(needs[1:]) * ["small_gradients"],
    ]  # fmt: skip


def test_matrices_that_lie_otherwise(ops):
    """A transposed weight, rows apart, factors and gradients that are not contiguous."""
    x, weight, u, s, v, bias, dy = draw((10,), 16, 24, 4, 2)
    apart = torch.zeros(10, 50).to(x.dtype)
    apart[:, 3:27] = x
    case = (
        apart[:, 3:27], [weight[0].mT.contiguous().mT, weight[1]], [t.mT.contiguous().mT for t in u],
        [t.repeat_interleave(2)[::2] for t in s], [t.mT.contiguous().mT for t in v], bias,
        [dy[0], dy[1].mT.contiguous().mT],
    )  # fmt: skip
    rest = ([], [0, 4], (True,) * 5)
    check(*case, *rest, run(*case, *rest))


@pytest.mark.parametrize("M,N,D,R", [(0, 8, 8, 2), (2, 0, 8, 2), (2, 8, 0, 2), (2, 8, 8, 0)])
def test_empty(M, N, D, R, ops):
    case = draw((M,), N, D, R)
    rest = ([], [0, R], (True,) * 5)
    check(*case, *rest, run(*case, *rest))


def test_single_has_its_gradients_of_few_rows(ops):
    case = draw((9,), 16, 24, 4, 2)
    y, p = subspace_linear.subspace_linear_group(*case[:-1], [], [0, 4], True, "stream", GPU)
    ops.launches.clear()
    grads = subspace_linear.subspace_linear_group_backward(
        case[-1], *case[:5], p, [], [0, 4], *(True,) * 5, "single", GPU
    )
    check(*case, [], [0, 4], (True,) * 5, (y, grads))
    assert ops.launches == ["small_gradients"]


def test_the_table_chooses_it(ops, monkeypatch):
    """For few rows, where the library is loaded and reads the weight as it lies."""
    case = draw((4,), 16, 24, 4, dtype=torch.float32)
    rest = ([], [0, 4], (True,) * 5)
    run(*case, *rest, strategy="")
    assert ops.launches == ["stream_linear", "small_gradients"]
    seen = []

    def choose(asked):
        seen.append(asked.cuda_library)
        return homes.REFERENCE

    monkeypatch.setattr(subspace_linear, "choose", choose)
    x, weight, *others = case
    run(x, [weight[0].mT.contiguous().mT], *others, *rest, strategy="")
    monkeypatch.setattr(small_batch, "available", lambda t: False)
    run(*case, *rest, strategy="")
    assert seen == 4 * [False]


def test_what_it_cannot_serve_is_refused(ops, monkeypatch):
    def forward(lead, R):
        x, *rest, _ = draw(lead, 8, 8, R)
        subspace_linear.subspace_linear_group(x, *rest, [], [0, R], True, "stream", GPU)

    with pytest.raises(RuntimeError, match=r"up to 64 rows of x and R <= 64, not 65 and 2; use 'kext'"):
        forward((5, 13), 2)
    with pytest.raises(RuntimeError, match="not 1 and 65"):
        forward((1,), 65)
    monkeypatch.setattr(small_batch, "available", lambda t: False)
    with pytest.raises(RuntimeError, match="needs libmasm_cuda, which is not loaded"):
        forward((1,), 2)
    assert ops.launches == []
