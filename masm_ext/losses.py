"""Regularisers of the artifact subspaces. The current weight is never formed; layers of one shape are stacked.

Terms after the words of arXiv 2601.01041 (orthogonality and spectral consistency constraints); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .config import MASMConfig
from .nn.masm_linear import MASMLinear, masm_layers

#: Singular values below this share of the root mean square count as this large in the spectral-consistency loss.
SPECTRAL_FLOOR = 1e-3

Layers = nn.Module | Sequence[MASMLinear]


def orthogonality_loss(model: Layers) -> Tensor:
    """Mean over layers of: overlap between subspaces, departure from orthonormality inside each, and interference with
    the semantic principal subspace. Zero at init.

    ``sum_{j<k} (||u_j u_k^T||^2 + ||v_j v_k^T||^2) + sum_k (||u_k u_k^T - I||^2 + ||v_k v_k^T - I||^2)
    + sum_k (||weight^T u_k^T||^2 + ||weight v_k^T||^2) / ||weight||^2`` (Frobenius norms).

    model: a converted model, or its MASMLinears. Returns a scalar that flows gradients into u and v.
    Raises ValueError if there is no MASMLinear.
    """
    return _penalties(model)[0]


def spectral_consistency_loss(model: Layers) -> Tensor:
    """Mean over layers of the squared relative change of ``||W||_F^2`` and of each subspace's singular values.

    ``((||What||^2 - ||W||^2) / ||W||^2)^2 + sum_k ||s_k - s_k0||^2 / ||s_k0||^2``, What the current weight. The second
    denominator is at least ``r_k (SPECTRAL_FLOOR sigma_rms)^2``, sigma_rms the root mean square of W's singular values:
    directions that the pretrained weight does not use at all (s_k0 near 0) would otherwise cost 1e8 a step. Zero at
    init. The change of the norm is computed as a difference of artifact terms (the principal part cancels), so that
    float32 does not drown it. Returns a scalar that flows gradients into u, s and v.
    """
    return _penalties(model)[1]


def regularization_loss(model: Layers, config: MASMConfig) -> Tensor:
    """Both losses, weighted by the coefficients of the config, from one pass over the layers."""
    orthogonality, spectral = _penalties(model)
    return config.orthogonality * orthogonality + config.spectral_consistency * spectral


def _penalties(model: Layers) -> tuple[Tensor, Tensor]:
    layers = list(masm_layers(model).values())
    if not layers:
        raise ValueError("the model has no MASMLinear: call convert(model, config) first")
    groups: dict[tuple, list[MASMLinear]] = {}
    for layer in layers:
        groups.setdefault((layer.weight.shape, layer.offsets, layer.u.dtype, layer.u.device), []).append(layer)
    with torch.autocast(layers[0].u.device.type, enabled=False):
        sums = [torch.stack(_group_sums(group)) for group in groups.values()]  # [groups][2]
    total = torch.stack([s.to(sums[0].device) for s in sums]).sum(0) / len(layers)
    return total[0], total[1]


def _group_sums(layers: list[MASMLinear]) -> tuple[Tensor, Tensor]:
    """Sums of the two losses over L layers of one shape."""
    first = layers[0]
    dtype = torch.promote_types(first.u.dtype, torch.float32)
    u, s, v, s0 = (torch.stack([getattr(x, n) for x in layers]).to(dtype) for n in ("u", "s", "v", "s0"))
    norm2 = torch.stack([x.weight_norm2 for x in layers]).to(dtype)  # [L]
    tiny, q = torch.finfo(dtype).tiny, min(first.weight.shape)
    gram_u, gram_v = u @ u.mT, v @ v.mT  # [L, R, R]
    # The weights are not stacked: that would hold the frozen model twice. (Half-precision ones are widened one by one.)
    weights = [x.weight.to(dtype) for x in layers]
    uw = torch.stack([a @ w for a, w in zip(u, weights)])  # [L, R, D]
    vw = torch.stack([b @ w.mT for b, w in zip(v, weights)])  # [L, R, N]

    block = torch.block_diag(*(torch.ones(r, r, dtype=dtype, device=u.device) for r in first.ranks))  # [R, R]
    eye = torch.eye(u.shape[1], dtype=dtype, device=u.device)
    between = sum((g * (1 - block)).square().sum((-2, -1)) / 2 for g in (gram_u, gram_v))  # [L]
    inside = sum(((g - eye) * block).square().sum((-2, -1)) for g in (gram_u, gram_v))
    interference = (uw.square().sum((-2, -1)) + vw.square().sum((-2, -1))) / norm2.clamp_min(tiny)
    orthogonality = (between + inside + interference).sum()

    s02 = s0.square()  # [L, R]
    base = norm2 + s02.sum(-1)  # ||W||^2: weight and the artifact part are orthogonal at init
    artifact = (s[:, :, None] * s[:, None, :] * gram_u * gram_v).sum((-2, -1))
    change = 2 * (s * (uw * v).sum(-1)).sum(-1) + artifact - s02.sum(-1)
    member = torch.stack(
        [block[a] for a in first.offsets[:-1]]  # [K, R], row k marks the directions of subspace k
    )
    ranks = member.sum(-1)  # [K]
    floor = (SPECTRAL_FLOOR**2 * base / q)[:, None] * ranks  # [L, K]
    drift = ((s - s0).square() @ member.mT) / torch.maximum(s02 @ member.mT, floor).clamp_min(tiny)  # [L, K]
    spectral = ((change / base.clamp_min(tiny)).square() + drift.sum(-1)).sum()
    return orthogonality, spectral
