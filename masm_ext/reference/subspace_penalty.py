"""The formula of masm::subspace_penalty and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from ..contract import accumulate_dtype, check_subspace_penalty


def subspace_penalty(
    weights: Sequence[Tensor],
    u: Sequence[Tensor],
    s: Sequence[Tensor],
    v: Sequence[Tensor],
    s0: Sequence[Tensor],
    weight_norm2: Sequence[Tensor],
    offsets: Sequence[int],
    subspaces: Sequence[int],
    need_gradients: bool = True,
    products: Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Orthogonality and spectral consistency, summed over L layers, and their gradients. The current weight
    What = weight + u^T diag(s) v is never formed.

    Per layer, k(r) the subspace of row r, A = u u^T, B = v v^T, X = v weight^T, Y = u weight:

    ``orthogonality = sum_{k(i)!=k(j)} (A_ij^2 + B_ij^2) / 2 + sum_{k(i)=k(j)} ((A - I)_ij^2 + (B - I)_ij^2)
    + (||Y||^2 + ||X||^2) / weight_norm2``

    ``spectral = (change / base)^2 + sum_k ||s_k - s0_k||^2 / (r_k sigma_rms^2)``, ``base = weight_norm2 + ||s0||^2``
    (= ||W||^2, since weight and the artifact part are orthogonal at init), ``sigma_rms^2 = base / q`` and
    ``change = ||What||^2 - ||W||^2 = 2 sum_r s_r Y_r . v_r + sum_ij s_i s_j A_ij B_ij - ||s0||^2``.

    Lists over the layers: weights [N, D]; u [R, N], s [R], v [R, D], s0 [R], weight_norm2 (one element) in the dtype of
    weights or wider; subspaces: K of each layer; offsets: K + 1 row bounds of each layer, one layer after the other.

    Returns orthogonality [] and spectral [] in the accumulate dtype, and gradients [2, P], row 0 of orthogonality, row
    1 of spectral, each every u, then every v, then every s, flat; [2, 0] if they are not needed. Layers of one shape
    are stacked; their weights are not: that would hold the frozen model twice. ``products`` replaces
    :func:`weight_products`, the only function that reads the weights.

    Raises RuntimeError for lists, shapes, dtypes or devices that do not fit.
    """
    bounds = check_subspace_penalty(weights, u, s, v, s0, weight_norm2, offsets, subspaces)
    dtype = accumulate_dtype(u[0].dtype)
    groups: dict[tuple, list[int]] = {}
    for i, (weight, bound) in enumerate(zip(weights, bounds)):
        groups.setdefault((weight.shape, weight.dtype, bound), []).append(i)
    total = u[0].new_zeros(2, dtype=dtype)
    pieces: dict[str, list[Tensor]] = {name: [u[0].new_empty(0)] * len(weights) for name in ("u", "v", "s")}  # [2, n]
    for (_, _, bound), group in groups.items():
        of_group = ([x[i] for i in group] for x in (weights, u, s, v, s0, weight_norm2))
        sums, gradients = _same_shape(*of_group, bound, dtype, need_gradients, products or weight_products)
        total = total + sums
        for name, gradient in gradients.items():  # [2, L, ...]
            for i, piece in zip(group, gradient.flatten(2).unbind(1)):
                pieces[name][i] = piece
    if need_gradients:
        gradients = torch.cat([p for name in ("u", "v", "s") for p in pieces[name]], dim=1)
    else:
        gradients = u[0].new_empty(2, 0, dtype=dtype)
    return total[0].clone(), total[1].clone(), gradients


def weight_products(weights: Sequence[Tensor], a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """``a weight`` [L, R, D] and ``b weight^T`` [L, R, N] for L weights [N, D]; a [L, R, N], b [L, R, D]."""
    wide = [w.to(a.dtype) for w in weights]
    return torch.stack([x @ w for x, w in zip(a, wide)]), torch.stack([x @ w.mT for x, w in zip(b, wide)])


def _same_shape(weights, u, s, v, s0, weight_norm2, offsets, dtype, need_gradients, products):
    """Sums [2] and gradients {u, v, s: [2, L, ...]} over L layers of one shape."""
    u, s, v, s0 = (torch.stack(list(x)).to(dtype) for x in (u, s, v, s0))
    norm2 = torch.stack([x.reshape(()) for x in weight_norm2]).to(dtype)  # [L]
    tiny, q = torch.finfo(dtype).tiny, max(1, min(weights[0].shape))
    R = s.shape[1]
    # [R, K], row r marks the subspace of direction r. By fills: a copy from the host would wait for a GPU.
    member = s.new_zeros(R, len(offsets) - 1)
    for k, (begin, end) in enumerate(pairwise(offsets)):
        member[begin:end, k] = 1
    ranks = member.sum(0)  # [K]
    same, eye = member @ member.mT, torch.eye(R, dtype=dtype, device=s.device)  # [R, R]

    gram_u, gram_v = u @ u.mT, v @ v.mT  # [L, R, R]
    uw, vw = products(weights, u, v)  # [L, R, D], [L, R, N]
    norm2_or_tiny = norm2.clamp_min(tiny)
    between = sum((g * (1 - same)).square().sum((-2, -1)) / 2 for g in (gram_u, gram_v))  # [L]
    inside = sum(((g - eye) * same).square().sum((-2, -1)) for g in (gram_u, gram_v))
    interference = (uw.square().sum((-2, -1)) + vw.square().sum((-2, -1))) / norm2_or_tiny

    s02 = s0.square()
    base = norm2 + s02.sum(-1)  # [L]
    base_or_tiny = base.clamp_min(tiny)
    overlap = (uw * v).sum(-1)  # [L, R], u_r weight v_r^T
    pairs = s[:, :, None] * s[:, None, :]
    artifact = (pairs * gram_u * gram_v).sum((-2, -1))
    change = (2 * (s * overlap).sum(-1) + artifact - s02.sum(-1)) / base_or_tiny
    denominator = ((base / q)[:, None] * ranks).clamp_min(tiny)  # [L, K], r_k sigma_rms^2
    drift = ((s - s0).square() @ member) / denominator
    sums = torch.stack([(between + inside + interference).sum(), (change.square() + drift.sum(-1)).sum()])
    if not need_gradients:
        return sums, {}

    scale = (2 / norm2_or_tiny)[:, None, None]
    slope = (2 * change / base_or_tiny)[:, None]  # [L, 1], d spectral / d (||What||^2 - ||W||^2)
    mix_u, mix_v = (2 * g * (1 - same) + 4 * (g - eye) * same for g in (gram_u, gram_v))
    vww, uww = products(weights, vw, uw)  # [L, R, D], [L, R, N]
    du = mix_u @ u + scale * uww
    dv = mix_v @ v + scale * vww
    half = slope[:, :, None]
    du_spectral = 2 * half * (s[..., None] * vw + (pairs * gram_v) @ u)
    dv_spectral = 2 * half * (s[..., None] * uw + (pairs * gram_u) @ v)
    ds_spectral = 2 * slope * (overlap + (gram_u * gram_v @ s[..., None])[..., 0])
    ds_spectral = ds_spectral + 2 * (s - s0) * ((1 / denominator) @ member.mT)
    return sums, {
        "u": torch.stack([du, du_spectral]),
        "v": torch.stack([dv, dv_spectral]),
        "s": torch.stack([torch.zeros_like(s), ds_spectral]),
    }
