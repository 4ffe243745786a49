"""Fresh inputs of a call of subspace_linear, its exact results, and the tiles that suit an interpreter."""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from masm_ext import reference
from masm_ext.kernels import subspace_linear as kernels
from masm_ext.kernels.launch import Target, Tile

#: sm_90 moves tiles by TMA where shapes allow it, sm_80 by pointers. Few SMs: several chunks, but not many.
POINTERS, TMA = Target(80, 2), Target(90, 2)
#: The interpreter's time grows with programs, not with elements.
TILE = Tile(32, 32, 32, 4, 2)

#: By dtype, "tf32" for float32 with tf32 allowed: relative error of y, dX and P; and of sums over rows. Half precision:
#: one rounding of the result, and P and Q are rounded once more for the sums. tf32: 11 bits of each operand.
TOLERANCE = {
    torch.float32: (1e-6, 2e-6),
    "tf32": (1e-3, 2e-3),
    torch.bfloat16: (4e-3, 8e-3),
    torch.float16: (6e-4, 1e-3),
}


@dataclass
class Call:
    x: Tensor
    weight: list[Tensor]
    u: list[Tensor]
    s: list[Tensor]
    v: list[Tensor]
    bias: list[Tensor]
    mask: list[Tensor]
    offsets: list[int]
    dy: list[Tensor]

    @property
    def factors(self):
        return self.weight, self.u, self.s, self.v

    def forward(self, strategy, target=POINTERS, tile=TILE, need_p=True):
        return kernels.subspace_linear_group(
            self.x, *self.factors, self.bias, self.mask, self.offsets, need_p, strategy, target, tile
        )

    def backward(self, p, strategy, target=POINTERS, tile=TILE, needs=(True,) * 5):
        return kernels.subspace_linear_group_backward(
            *(self.dy, self.x, *self.factors, p, self.mask, self.offsets, *needs, strategy, target, tile)
        )

    def exact(self, needs=(True,) * 5):
        """y, p and the gradients in float64."""

        def wide(tensors):
            return [t.double() for t in tensors]

        factors = [wide(t) for t in self.factors]
        y, p = reference.subspace_linear_group(self.x.double(), *factors, wide(self.bias), self.mask, self.offsets)
        grads = reference.subspace_linear_group_backward(
            wide(self.dy), self.x.double(), *factors, p, self.mask, self.offsets, *needs
        )
        return y, p, grads

    def map(self, change):
        """The same call with every tensor of it replaced by change(tensor)."""
        lists = ([change(t) for t in ts] for ts in (*self.factors, self.bias, self.mask))
        return Call(change(self.x), *lists, self.offsets, [change(t) for t in self.dy])


def draw(M, N, D, ranks, dtype, factor_dtype=None, layers=1, bias=True, masks=None) -> Call:
    R, f = sum(ranks), factor_dtype or (torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype)

    def each(*shape, scale=1.0, dtype=f):
        return [(scale * torch.randn(*shape)).to(dtype) for _ in range(layers)]

    return Call(
        torch.randn(M, D).to(dtype),
        each(N, D, scale=max(D, 1) ** -0.5, dtype=dtype),
        each(R, N),
        each(R),
        each(R, D, scale=max(D, 1) ** -0.5),
        each(N, dtype=dtype) if bias else [],
        [] if masks is None else [torch.tensor(m) for m in masks],
        [0, *itertools.accumulate(ranks)],
        each(M, N, dtype=dtype),
    )


def error(got: Tensor, want: Tensor) -> float:
    """||got - want|| / ||want||; NaN anywhere gives NaN."""
    assert got.shape == want.shape, (got.shape, want.shape)
    got, want = got.double(), want.double()
    return float((got - want).norm() / want.norm().clamp_min(1e-30)) if want.numel() else 0.0


def check(call: Call, strategy, target=POINTERS, tile=TILE, needs=(True,) * 5, precision=None, got=None) -> None:
    """Forward and backward against float64."""
    y, p, grads = call.exact(needs)
    got_y, got_p = call.forward(strategy, target, tile) if got is None else got
    got_grads = call.backward(got_p, strategy, target, tile, needs)
    dtype = call.x.dtype
    single, sums = TOLERANCE[precision or dtype]
    for a, b in zip(got_y, y):
        assert a.dtype == dtype and error(a, b) <= single
    assert got_p.dtype == torch.float32 and error(got_p, p) <= single
    names = ("dx", "du", "ds", "dv", "dbias")
    for name, a, b, like in zip(names, got_grads, grads, (call.x, call.u[0], call.s[0], call.v[0], call.weight[0])):
        assert a.dtype == like.dtype
        if name == "ds" and b.numel():  # sum_m P * Q may cancel: compared with its terms
            q = torch.cat([dy.double() @ u.double().mT for dy, u in zip(call.dy, call.u)], -1)
            assert float((a.double() - b).norm()) <= sums * float((p * q).abs().sum(0).norm()), name
        else:
            assert error(a, b) <= (single if name == "dx" else sums), name
