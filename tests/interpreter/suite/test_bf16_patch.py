"""Canary: the patched interpreter rounds bfloat16 and tf32 as a GPU does."""

import torch
import triton
import triton.language as tl


@triton.jit
def _dot(A, B, C, TF32: tl.constexpr):
    i = tl.arange(0, 16)
    at = i[:, None] * 16 + i[None, :]
    a, b = tl.load(A + at), tl.load(B + at)
    if TF32:
        c = tl.dot(a, b, input_precision="tf32")
    else:
        c = tl.dot(a, b, input_precision="ieee")
    tl.store(C + at, c.to(C.dtype.element_ty))


def test_a_bfloat16_dot_product_is_rounded_once():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    c = torch.empty_like(a)
    _dot[(1,)](a, b, c, TF32=False)
    exact = a.double() @ b.double()
    assert (c.double() - exact).norm() / exact.norm() < 4e-3


def test_tf32_keeps_ten_bits_and_only_where_requested():
    a, b = torch.randn(16, 16), torch.randn(16, 16)
    c = torch.empty_like(a)
    exact, error = a.double() @ b.double(), {}
    for tf32 in (False, True):
        _dot[(1,)](a, b, c, TF32=tf32)
        error[tf32] = float((c.double() - exact).norm() / exact.norm())
    assert error[False] < 1e-6 and 5e-5 < error[True] < 1e-3
