"""Lifted singular values: the same output, gradients for u and v from the first step, the norms and the adapter."""

import math

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, load_adapter, orthogonality_loss, save_adapter, scale_free_groups

CONFIG = dict(target_modules=["0"], modules_to_save="1", num_subspaces=2, subspace_rank=[3, 2])


def weight(N=24, D=40):
    """Singular values from 10 down to 1e-4."""
    u, _, v = torch.linalg.svd(torch.randn(N, D, dtype=torch.float64), full_matrices=False)
    return (u * torch.logspace(1, -4, min(N, D), dtype=torch.float64)) @ v


def linear(seed, N=24, D=40):
    torch.manual_seed(seed)
    layer = nn.Linear(D, N)
    layer.weight.data.copy_(weight(N, D))
    return layer


@pytest.mark.parametrize("lift", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16)])
@pytest.mark.parametrize("directions", ["trailing", "leading", "random"])
def test_the_output_and_the_norms_are_those_of_the_weight(seed, lift, shape, directions):
    plain = linear(seed, *shape)
    layer = MASMLinear.from_linear(plain, MASMConfig(**CONFIG, lift=lift, directions=directions))
    x = torch.randn(9, shape[1])
    assert relative_error(layer(x), plain(x)) < 2e-6
    W = plain.weight.detach().double()
    rms = W.norm() / math.sqrt(min(shape))
    sigma = torch.linalg.svdvals(W)[list(layer.directions)]
    torch.testing.assert_close(layer.s.detach().double(), sigma + lift * rms, rtol=1e-5, atol=1e-7)
    assert layer.base_norm() == pytest.approx(float(W.norm()), rel=1e-5)
    with torch.no_grad():
        layer.u.add_(0.1 * torch.randn_like(layer.u))
    dense = (layer.folded_weight().double() - W).norm() / W.norm()
    assert layer.relative_update() == pytest.approx(float(dense), rel=1e-4)


def test_directions_learn_from_the_first_step(seed):
    def gradient(lift):
        layer = MASMLinear.from_linear(linear(seed), MASMConfig(**CONFIG, lift=lift))
        layer(torch.randn(32, 40, generator=torch.Generator().manual_seed(1))).square().sum().backward()
        return float(layer.u.grad.norm())

    assert gradient(1.0) > 100 * gradient(0.0)


def test_an_adapter_keeps_the_lift(seed, tmp_path):
    def model():
        return nn.Sequential(linear(seed), nn.Linear(24, 1))

    trained = model()
    torch.manual_seed(seed)
    fresh = model()
    fresh.load_state_dict(trained.state_dict())
    convert(trained, MASMConfig(**CONFIG, lift=0.5), use_cache=False, progress=False)
    with torch.no_grad():
        trained[0].v.add_(0.05 * torch.randn_like(trained[0].v))
    save_adapter(trained, tmp_path / "a")
    load_adapter(fresh, tmp_path / "a")
    x = torch.randn(5, 40)
    assert torch.equal(fresh(x), trained(x)) and fresh[0].lift == 0.5
    assert fresh[0].base_norm() == trained[0].base_norm()
    rates = [[group["lr"] for group in scale_free_groups(m)] for m in (trained, fresh)]
    assert rates[0] == rates[1]


def test_penalties_and_a_negative_lift_are_refused():
    model = nn.Sequential(linear(0), nn.Linear(24, 1))
    convert(model, MASMConfig(**CONFIG, lift=0.5), use_cache=False, progress=False)
    with pytest.raises(ValueError, match=r"with MASMConfig\.lift it holds the lift too"):
        orthogonality_loss(model)
    with pytest.raises(ValueError, match="lift must be 0 or more, got -1"):
        MASMConfig(lift=-1)
