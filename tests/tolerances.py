"""Relative errors ``||out - ref|| / ||ref||`` against float64, by dtype, each with its reason."""

import torch

#: one dense product of depth <= 4096, float64: a few times sqrt(depth) * 1.1e-16
#: float32: the same with 6e-8; bfloat16 and float16: one rounding of the output dominates (2^-9, 2^-12), times two
#: for the dense product that is rounded before the low-rank part is added
RELATIVE = {
    torch.float64: 1e-13,
    torch.float32: 2e-6,
    torch.bfloat16: 8e-3,
    torch.float16: 1e-3,
}

#: gradients, as promised in the README: sums over M rows in the accumulate dtype
GRADIENT = {
    torch.float64: 1e-10,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def relative_error(out: torch.Tensor, ref: torch.Tensor, terms: torch.Tensor | None = None) -> float:
    """NaN anywhere in ``out`` gives NaN, which no tolerance accepts. ``terms``: the size of its summands, for where few
    elements may cancel: the error is then over the larger of the two norms."""
    out, ref = out.detach().double(), ref.detach().double()
    assert out.shape == ref.shape, (out.shape, ref.shape)
    if ref.numel() == 0:
        return 0.0
    norm = ref.norm() if terms is None else torch.maximum(ref.norm(), terms.double().norm())
    return float((out - ref).norm() / norm) if norm > 0 else float((out - ref).norm())


def factor_terms(
    x: torch.Tensor, u: torch.Tensor, s: torch.Tensor, v: torch.Tensor, dy: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The size of the summands of the gradients of the factors, from float64 tensors with any leading dimensions:
    ``(R, N)`` for u, ``(R, D)`` for v, ``(R,)`` for s. Sums of few terms may cancel, those over rows and P and Q
    themselves: the rounding of u and v to bfloat16 counts against the root of the terms' squares where that is larger
    than the sum."""
    x, u, s, v, dy = (t.detach().double() for t in (x, u, s, v, dy))
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    p_size = torch.maximum((x @ v.T).abs(), (x.square() @ v.square().T).sqrt())
    q_size = torch.maximum((dy @ u.T).abs(), (dy.square() @ u.square().T).sqrt())
    return {
        "u": ((p_size * s).square().T @ dy.square()).sqrt(),
        "s": (p_size * q_size).sum(0),
        "v": ((q_size * s).square().T @ x.square()).sqrt(),
    }
