"""Regularisers of the artifact subspaces, over ``masm::subspace_penalty``. The current weight is never formed.

The terms follow the text of arXiv 2601.01041 (orthogonality and spectral consistency); the formulas are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from .autocast import autocast_off
from .config import MASMConfig
from .contract import accumulate_dtype
from .nn.masm_linear import MASMLinear, masm_layers
from .ops import subspace_penalty
from .quantized_weight import dense_weight, is_made_dense
from .registry import PENALTIES

Layers = nn.Module | Sequence[MASMLinear]


def orthogonality_loss(model: Layers) -> Tensor:
    """Penalty on non-orthonormal subspaces and on overlap between subspaces or with the principal part.

    Per layer ``sum_{j<k} (||u_j u_k^T||^2 + ||v_j v_k^T||^2) + sum_k (||u_k u_k^T - I||^2 + ||v_k v_k^T - I||^2)
    + sum_k (||weight^T u_k^T||^2 + ||weight v_k^T||^2) / ||weight||^2`` with Frobenius norms; ``weight`` is the frozen
    principal part. Zero at init, up to rounding.

    Args:
        model: a converted model, or its MASMLinears.

    Returns:
        The mean over the layers, a scalar, differentiable in u and v.

    Raises:
        ValueError: the model has no MASMLinear.
    """
    return _penalties(model)[0]


def spectral_consistency_loss(model: Layers) -> Tensor:
    """Penalty on relative changes of ``||W||_F^2`` and of the trained singular values.

    Per layer ``((||W_hat||^2 - ||W||^2) / ||W||^2)^2 + sum_k ||s_k - s_k0||^2 / (r_k sigma_rms^2)``. ``W_hat`` is the
    current weight, ``W`` the pretrained one, ``s_k0`` the initial ``s_k``, and ``sigma_rms`` the root mean square of
    W's singular values. Zero at init, up to rounding. The second term is not relative to ``||s_k0||^2``: for trailing
    directions that is 1e-4 to 1e-12, and the term would exceed the task loss after one useful step. ``||W_hat||^2 -
    ||W||^2`` is computed from the artifact terms alone, where the principal part cancels; in float32 the difference of
    the two full norms would be lost.

    Args:
        model: a converted model, or its MASMLinears.

    Returns:
        The mean over the layers, a scalar, differentiable in u, s and v.

    Raises:
        ValueError: the model has no MASMLinear.
    """
    return _penalties(model)[1]


def regularization_loss(model: Layers, config: MASMConfig, terms: Mapping[str, float] | None = None) -> Tensor:
    """The two penalties, and any registered ones, as one loss term to add to the task loss.

    As part of the loss, the penalties enter the moments of the optimizer. :class:`masm_ext.MaskedAdamW` can apply them
    decoupled instead. Use one of the two ways, not both.

    Args:
        model: a converted model, or its MASMLinears.
        config: ``orthogonality`` and ``spectral_consistency`` are the coefficients of the two penalties.
        terms: coefficients of further penalties by their names in :data:`masm_ext.registry.PENALTIES`. Each penalty is
            a function of one layer in plain PyTorch; its mean over the layers is added. To register one::

                @PENALTIES.register("nuclear")
                def nuclear(layer: MASMLinear) -> Tensor:
                    return layer.s.abs().sum()

    Returns:
        A scalar, differentiable in u, s and v.

    Raises:
        ValueError: the model has no MASMLinear, or a name is unknown.
    """
    orthogonality, spectral = _penalties(model)
    total = config.orthogonality * orthogonality + config.spectral_consistency * spectral
    if terms:
        layers = list(masm_layers(model).values())
        with autocast_off(layers[0].u):
            total = total + _sum_of_terms(layers, terms).to(total) / len(layers)
    return total


def term_gradients(layers: Sequence[MASMLinear], terms: Mapping[str, float]) -> tuple[Tensor, list[Tensor]]:
    """The weighted penalties of ``terms`` summed over the layers, and their gradients by autograd.

    Returns:
        The sum, a scalar, and per dtype of the factors [P], flat, in the order of :func:`penalty_parameters`.
    """
    lists = penalty_parameters(layers)
    learning = [p for parameters in lists for p in parameters if p.requires_grad]
    with torch.enable_grad(), autocast_off(layers[0].u):
        total = _sum_of_terms(layers, terms)
        grads: dict[Tensor, Tensor] = {}
        if total.requires_grad:
            found = torch.autograd.grad(total, learning, allow_unused=True, materialize_grads=True)
            grads = dict(zip(learning, found))
    flat = [
        torch.cat([grads.get(p, torch.zeros_like(p)).reshape(-1) for p in parameters]).to(
            accumulate_dtype(parameters[0].dtype)
        )
        for parameters in lists
    ]
    return total.detach(), flat


def _sum_of_terms(layers: Sequence[MASMLinear], terms: Mapping[str, float]) -> Tensor:
    values = [PENALTIES[name](layer) * coefficient for name, coefficient in terms.items() for layer in layers]
    return torch.stack([value.to(accumulate_dtype(value.dtype)) for value in values]).sum()


def penalty_parameters(layers: Sequence[MASMLinear]) -> list[list[Tensor]]:
    """The parameters of :func:`penalty_gradients` in its order: per dtype of the factors every u, every v, every s."""
    return [[getattr(x, name) for name in ("u", "v", "s") for x in group] for group in _by_dtype(layers)]


def penalty_gradients(layers: Sequence[MASMLinear]) -> tuple[Tensor, list[Tensor]]:
    """Both penalties, summed over the layers, [2], and their gradients without autograd: per dtype of the factors
    [2, P], flat, in the order of :func:`penalty_parameters`."""
    total, gradients = None, []
    with torch.no_grad(), autocast_off(layers[0].u):
        for group in _by_dtype(layers):
            orthogonality, spectral, flat = torch.ops.masm.subspace_penalty(*_lists(group), *_bounds(group), True)
            values = torch.stack([orthogonality, spectral])
            total = values if total is None else total + values.to(total)
            gradients.append(flat)
    return total, gradients


def _penalties(model: Layers) -> tuple[Tensor, Tensor]:
    layers = list(masm_layers(model).values())
    if not layers:
        raise ValueError("the model has no MASMLinear: call convert(model, config) first")
    sums = [subspace_penalty(*_lists(group), [x.offsets for x in group]) for group in _by_dtype(layers)]
    orthogonality, spectral = sums[0]
    for a, b in sums[1:]:
        orthogonality, spectral = orthogonality + a.to(orthogonality), spectral + b.to(spectral)
    return orthogonality / len(layers), spectral / len(layers)


def _by_dtype(layers: Sequence[MASMLinear]) -> list[list[MASMLinear]]:
    """One call of the op computes layers of one dtype and device, of any shapes. A layer with a quantised or sharded
    weight has a call of its own, so that only one dense weight exists at a time."""
    groups: dict[tuple, list[MASMLinear]] = {}
    for layer in layers:
        alone = id(layer) if is_made_dense(layer.principal) else None
        groups.setdefault((layer.u.dtype, layer.u.device, alone), []).append(layer)
    return list(groups.values())


def _lists(layers: Sequence[MASMLinear]) -> list[list[Tensor]]:
    if any(layer.lift for layer in layers):
        raise ValueError(
            "the penalties take the frozen part for the principal subspace, but with MASMConfig.lift it holds the lift "
            "too: set orthogonality and spectral_consistency to 0, or lift to 0"
        )
    weights = [dense_weight(layer.principal, layer.principal.dtype) for layer in layers]
    others = [[getattr(layer, name) for layer in layers] for name in ("u", "s", "v", "s0", "weight_norm2")]
    return [weights, *others]


def _bounds(layers: Sequence[MASMLinear]) -> tuple[list[int], list[int]]:
    """The row bounds of all layers, one layer after the other, and K of each."""
    return list(chain.from_iterable(x.offsets for x in layers)), [x.num_subspaces for x in layers]
