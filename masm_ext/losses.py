"""Regularisers of the artifact subspaces, over ``masm::subspace_penalty``. The current weight is never formed.

Terms after the words of arXiv 2601.01041 (orthogonality and spectral consistency constraints); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from .config import MASMConfig
from .nn.masm_linear import MASMLinear, masm_layers
from .ops import subspace_penalty

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
    denominator is at least ``r_k (1e-3 sigma_rms)^2``, sigma_rms the root mean square of W's singular values:
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
        groups.setdefault((layer.u.dtype, layer.u.device), []).append(layer)
    sums = [_sums(group) for group in groups.values()]
    orthogonality, spectral = sums[0]
    for a, b in sums[1:]:
        orthogonality, spectral = orthogonality + a.to(orthogonality), spectral + b.to(spectral)
    return orthogonality / len(layers), spectral / len(layers)


def _sums(layers: list[MASMLinear]) -> tuple[Tensor, Tensor]:
    """Sums of the two losses over layers of one dtype and device, of any shapes."""
    names = ("weight", "u", "s", "v", "s0", "weight_norm2")
    return subspace_penalty(*([getattr(x, n) for x in layers] for n in names), [x.offsets for x in layers])
