"""Strategy `stream` from the op's CUDA implementation down: the launching Python code and the emulated kernel. Its
backward pass is in Triton: tests/interpreter."""

import re

import pytest
import torch
from emulated import DTYPES, SOURCES, call
from tolerances import RELATIVE, relative_error

pytest.importorskip("triton", reason="the implementation of the op on CUDA imports Triton, which is not installed here")

from masm_ext import reference
from masm_ext.kernels import launch_plan, small_batch, subspace_linear
from masm_ext.kernels.launch import Target
from masm_ext.ops import strategies

GPU = Target(90, 3)
#: Of the op that csrc/cuda/small_batch.cpp registers.
[DEFINITION] = re.findall(r"m\.def\((.*?)\);", (SOURCES / "cuda/small_batch.cpp").read_text(), re.S)
SCHEMA = "".join(re.findall(r'"(.*?)"', DEFINITION))


class Emulated:
    """The op of csrc/cuda/small_batch.cpp: its checks of strides and sizes, and the kernel. ``ops``: as a torch op, as
    it is called and as a launch plan records it."""

    def __init__(self, emulated, seed):
        self.emulated, self.seed, self.launches = emulated, seed % 2**31, 0
        self.library = torch.library.Library("masm_emulated", "FRAGMENT")
        self.library.impl(self.library.define(SCHEMA), self.stream_linear, "CPU")
        self.ops = torch.ops.masm_emulated

    def stream_linear(self, x, weight, u, s, v, bias, y, p):
        self.launches += 1
        assert all(t is None or t.is_contiguous() for t in (u, s, v, bias, y, p))
        rows = [t for t in (x, weight, v) if t.numel()]
        assert all(t.stride(1) == 1 and t.stride(0) % 8 == 0 and t.data_ptr() % 16 == 0 for t in rows)
        sizes = torch.tensor([*x.shape[:1], *weight.shape, s.shape[0], x.stride(0), weight.stride(0)])
        types = (DTYPES[x.dtype], DTYPES[v.dtype], GPU.processors, self.seed % 2, self.seed)
        call(self.emulated("stream_linear").stream_linear, sizes, x, weight, u, s, v, bias, y, p, *types)


@pytest.fixture
def ops(emulated, seed, monkeypatch):
    ops = Emulated(emulated, seed)
    monkeypatch.setattr(small_batch, "OPS", ops.ops)
    monkeypatch.setattr(small_batch, "available", lambda t: True)
    launch_plan.forget()  # plans of earlier tests call an op that no longer exists
    yield ops
    launch_plan.forget()
    ops.library._destroy()


def draw(lead, N, D, R, J=1, dtype=torch.bfloat16):
    def layers(*size, to=torch.float32):
        return [torch.randn(size, dtype=torch.float64).to(to) for _ in range(J)]

    weight, u, s, v = layers(N, D, to=dtype), layers(R, N), layers(R), layers(R, D)
    return torch.randn(*lead, D).to(dtype), weight, u, s, v, layers(N, to=dtype)


def check(x, weight, u, s, v, bias, strategy="stream", need_p=True):
    offsets = [0, s[0].shape[0]]
    y, p = subspace_linear.subspace_linear_group(x, weight, u, s, v, bias, [], offsets, need_p, strategy, GPU)
    wide = [[t.double() for t in ts] for ts in (weight, u, s, [t.to(x.dtype) for t in v])]
    want, want_p = reference.subspace_linear_group(x.double(), *wide, [t.double() for t in bias], [], offsets)
    for a, b in zip(y, want):
        assert a.dtype == x.dtype and relative_error(a, b) <= RELATIVE[x.dtype]
    assert relative_error(p, want_p) <= RELATIVE[torch.float32] if need_p else p.shape == (*x.shape[:-1], 0)


@pytest.mark.parametrize("J", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward(J, dtype, ops):
    for lead, need_p in (((3, 4), True), ((18,), False)):
        check(*draw(lead, 24, 40, 6, J, dtype), need_p=need_p)
    assert ops.launches == 2 * J  # a group is not faster: each weight streams once


def test_repeated_calls_are_played(ops, monkeypatch):
    """The third call and every later one, each with inputs of its own: other values at other addresses."""
    replayed = []
    replay = launch_plan.LaunchPlan.replay
    monkeypatch.setattr(
        launch_plan.LaunchPlan, "replay", lambda self, inputs: replayed.append(1) or replay(self, inputs)
    )
    for i in range(4):
        check(*draw((18,), 24, 40, 6))
        assert ops.launches == i + 1 and len(replayed) == max(0, i - 1)


def test_matrices_that_lie_otherwise(ops):
    """A transposed weight, rows apart and not at multiples of 16 bytes, factors that are not contiguous."""
    x, weight, u, s, v, bias = draw((10,), 16, 24, 4, 2)
    apart = torch.zeros(10, 50).to(x.dtype)
    apart[:, 3:27] = x
    u, v = ([t.mT.contiguous().mT for t in ts] for ts in (u, v))
    s = [t.repeat_interleave(2)[::2] for t in s]
    check(apart[:, 3:27], [weight[0].mT.contiguous().mT, weight[1]], u, s, v, bias)


@pytest.mark.parametrize("M,N,D,R", [(0, 8, 8, 2), (2, 0, 8, 2), (2, 8, 0, 2), (2, 8, 8, 0)])
def test_empty(M, N, D, R, ops):
    check(*draw((M,), N, D, R))


def test_the_table_chooses_it(ops, monkeypatch):
    """For few rows, forward, if the library is loaded and can read the weight in place."""
    x, weight, *others = draw((4,), 16, 2048, 17)
    check(x, weight, *others, strategy="")
    assert ops.launches == 1
    arguments = (x, 16, 2048, 17)
    assert subspace_linear._choose(*arguments, weight, GPU, True) == strategies.STREAM
    assert subspace_linear._choose(*arguments, weight, GPU, True, dx=True) != strategies.STREAM
    assert subspace_linear._choose(*arguments, [weight[0].mT.contiguous().mT], GPU, True) != strategies.STREAM
    monkeypatch.setattr(small_batch, "available", lambda t: False)
    assert subspace_linear._choose(*arguments, weight, GPU, True) != strategies.STREAM


def test_what_it_cannot_serve_is_refused(ops, monkeypatch):
    with pytest.raises(RuntimeError, match=r"up to 64 rows of x and R <= 64, not 65 and 2; use 'kext'"):
        check(*draw((5, 13), 8, 8, 2))
    with pytest.raises(RuntimeError, match="not 1 and 65"):
        check(*draw((1,), 8, 8, 65))
    for D, dtype in ((12, torch.bfloat16), (8, torch.float32)):
        with pytest.raises(RuntimeError, match="half precision and inputs of a multiple of 8; use 'single'"):
            check(*draw((1,), 8, D, 2, dtype=dtype))
    monkeypatch.setattr(small_batch, "available", lambda t: False)
    with pytest.raises(RuntimeError, match="needs libmasm_cuda, which is not loaded"):
        check(*draw((1,), 8, 8, 2))
    assert ops.launches == 0
