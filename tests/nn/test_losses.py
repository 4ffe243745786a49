from itertools import pairwise

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import (
    MASMConfig,
    MASMLinear,
    convert,
    orthogonality_loss,
    regularization_loss,
    spectral_consistency_loss,
)


def layers(dtype=torch.float32, shapes=((12, 20), (12, 20), (16, 9))):
    config = MASMConfig(num_subspaces=3, subspace_rank=[2, 3, 1])
    made = [MASMLinear.from_linear(nn.Linear(d, n).to(dtype), config) for n, d in shapes]
    return made


def perturb(made, scale=0.1):
    with torch.no_grad():
        for layer in made:
            for p in (layer.u, layer.s, layer.v):
                p.add_(scale * torch.randn_like(p))


def direct(layer):
    """METHOD's formulas, one layer, float64, the current weight formed."""
    u, s, v, w = (t.double() for t in (layer.u, layer.s, layer.v, layer.weight))
    parts = list(pairwise(layer.offsets))
    orth = 0
    for j, (a, b) in enumerate(parts):
        for c, d in parts[j + 1 :]:
            orth = orth + (u[a:b] @ u[c:d].T).square().sum() + (v[a:b] @ v[c:d].T).square().sum()
        eye = torch.eye(b - a, dtype=torch.float64)
        orth = orth + (u[a:b] @ u[a:b].T - eye).square().sum() + (v[a:b] @ v[a:b].T - eye).square().sum()
        orth = orth + ((w.T @ u[a:b].T).square().sum() + (w @ v[a:b].T).square().sum()) / w.square().sum()
    base = (w + (layer.u0.double().T * layer.s0.double()) @ layer.v0.double()).square().sum()
    now = (w + (u.T * s) @ v).square().sum()
    spec = ((now - base) / base).square()
    for a, b in parts:
        s0 = layer.s0.double()[a:b]
        spec = spec + (s[a:b] - s0).square().sum() / ((b - a) * base / min(w.shape))
    return orth, spec


def test_match_the_formulas_and_their_gradients():
    made = layers(torch.float64)
    perturb(made)
    leaves = [p for layer in made for p in (layer.u, layer.s, layer.v)]
    for index, loss in enumerate((orthogonality_loss, spectral_consistency_loss)):
        want = sum(direct(layer)[index] for layer in made) / len(made)
        got = loss(made)
        assert relative_error(got, want) <= 1e-10
        a = torch.autograd.grad(got, leaves, allow_unused=True, materialize_grads=True)
        b = torch.autograd.grad(want, leaves, allow_unused=True, materialize_grads=True)
        for x, y in zip(a, b):
            assert relative_error(x, y) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_zero_at_init_and_float32_is_close(dtype):
    made = layers(dtype)
    tolerance = {torch.float64: 1e-20, torch.float32: 1e-10, torch.bfloat16: 1e-4}[dtype]
    assert 0 <= orthogonality_loss(made).item() <= tolerance
    assert 0 <= spectral_consistency_loss(made).item() <= tolerance
    perturb(made, 0.01)
    for index, loss in enumerate((orthogonality_loss, spectral_consistency_loss)):
        want = sum(direct(layer)[index] for layer in made) / len(made)
        # beside a bfloat16 weight, W and its parts are orthogonal only to that weight's rounding
        assert relative_error(loss(made), want) <= (5e-3 if dtype == torch.bfloat16 else 1e-4)


def test_coefficients_and_autocast():
    model = nn.Sequential(nn.Linear(10, 8), nn.Linear(8, 10))
    config = MASMConfig(target_modules="*", subspace_rank=1, orthogonality=0.5, spectral_consistency=2.0)
    convert(model, config, use_cache=False, progress=False)
    perturb([model[0], model[1]])
    want = 0.5 * orthogonality_loss(model) + 2 * spectral_consistency_loss(model)
    assert relative_error(regularization_loss(model, config), want) <= 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        got = regularization_loss(model, config)
    assert got.dtype == torch.float32 and torch.equal(got, regularization_loss(model, config))


def test_a_zero_weight_gives_finite_losses():
    linear = nn.Linear(6, 5)
    nn.init.zeros_(linear.weight)
    layer = MASMLinear.from_linear(linear, MASMConfig(subspace_rank=1))
    total = orthogonality_loss([layer]) + spectral_consistency_loss([layer])
    total.backward()
    assert total.isfinite() and layer.s.grad.isfinite().all()


def test_no_masm_layer():
    with pytest.raises(ValueError, match="call convert"):
        orthogonality_loss(nn.Linear(3, 3))


def test_a_rank_deficient_weight_does_not_explode():
    linear = nn.Linear(16, 16)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(16, 8) @ torch.randn(8, 16) / 16)
    layer = MASMLinear.from_linear(linear, MASMConfig(subspace_rank=2))
    with torch.no_grad():
        layer.s.add_(1e-3)
    loss = spectral_consistency_loss([layer])
    assert 0 < loss.item() < 1e4
