import pytest
import torch
from tolerances import RELATIVE, relative_error

from masm_ext import reference
from masm_ext.ops import fold

SHAPES = [(6, 4, 3), (65, 33, 7), (128, 96, 16), (1, 1, 1), (5, 7, 0), (0, 4, 2), (4, 0, 2)]


def make(N, D, R, dtype, factor_dtype):
    return (
        torch.randn(N, D).to(dtype),
        torch.randn(R, N).to(factor_dtype),
        torch.rand(R).to(factor_dtype),
        torch.randn(R, D).to(factor_dtype),
    )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["same", "float32"])
def test_matches_float64(shape, dtype, wide):
    args = make(*shape, dtype, torch.float32 if wide and dtype != torch.float64 else dtype)
    got = fold(*args)
    assert got.dtype == dtype
    assert relative_error(got, reference.fold(*(t.double() for t in args)), terms=args[0]) <= RELATIVE[dtype]
    assert torch.equal(got, fold(*args))


def test_is_rounded_once():
    # every element of a bfloat16 fold is the float64 result rounded once, up to ties decided by float32 sums
    args = make(64, 48, 5, torch.bfloat16, torch.float32)
    w, u, s, v = (t.double() for t in args)
    exact = reference.fold(w, u, s, v)
    ulp = 2.0 ** (exact.abs().log2().floor() - 7)
    sums = 1e-6 * (w.abs() + (u.abs().mT * s) @ v.abs())  # float32 sums before the one rounding
    assert ((fold(*args).double() - exact).abs() <= 0.5 * ulp + sums).all()


def test_non_contiguous():
    w, u, s, v = make(10, 12, 3, torch.float32, torch.float32)
    odd = (w.mT.contiguous().mT, u.mT.contiguous().mT, torch.stack([s, s], 1)[:, 0], v.mT.contiguous().mT)
    assert torch.equal(fold(*odd), fold(w, u, s, v))


@pytest.mark.parametrize("dtype", list(RELATIVE), ids=str)
def test_opcheck(dtype):
    torch.library.opcheck(torch.ops.masm.fold.default, make(6, 5, 2, dtype, dtype))


def test_bad_shape():
    w, u, s, v = make(6, 5, 2, torch.float32, torch.float32)
    with pytest.raises(RuntimeError, match=r"expected v of shape \[2, 5\], got \[2, 4\]"):
        fold(w, u, s, v[:, :4])
