"""The kernel of csrc/cuda/fold.cuh on the CPU, against the reference in float64."""

import pytest
import torch
from emulated import DTYPES, call
from tolerances import RELATIVE, relative_error

from masm_ext import reference


@pytest.mark.parametrize("wide", [False, True], ids=["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 65, 11), (1, 1, 1), (4, 31, 0), (7, 32, 16)], ids=str)
def test_matches_the_formula(shape, dtype, wide, emulated, seed):
    N, D, R = shape
    factors = torch.float32 if wide and dtype.itemsize == 2 else dtype
    weight = torch.randn(N, D).to(dtype)
    u, s, v = (t.to(factors) for t in (torch.randn(R, N), torch.rand(R), torch.randn(R, D)))
    out = torch.full((N, D), torch.nan, dtype=dtype)
    call(emulated("fold").fold, out, weight, u, s, v, N, D, R, DTYPES[dtype], DTYPES[factors], seed % 2**31)
    exact = reference.fold(*(t.double() for t in (weight, u, s, v)))
    assert relative_error(out, exact, terms=weight) <= RELATIVE[dtype]
