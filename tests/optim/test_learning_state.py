"""The statistics behind the masks: the gradient of the task, unbiased by noise and without the penalties."""

import copy

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import (
    LayerMasks,
    MaskedAdamW,
    MASMConfig,
    convert,
    orthogonality_loss,
    param_groups,
    spectral_consistency_loss,
)


def build(policy=None, **fields):
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    settings = dict(target_modules=["0", "2"], modules_to_save="4", num_subspaces=2, subspace_rank=[3, 2]) | fields
    config = MASMConfig(**settings)
    convert(model, config, use_cache=False, progress=False)
    return model, LayerMasks(model, config, policy), config


def run(gradient, steps=500, scale=lambda step: 1.0):
    """The masks after steps whose gradients are `gradient(p, generator)`, times `scale`; rate 0."""
    torch.manual_seed(0)
    model, masks, _ = build(mask_warmup=10**6)
    optimizer = MaskedAdamW(param_groups(model, 0.0), masks=masks)
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = scale(step) * gradient(p, generator)
        optimizer.step()
    return masks


def constant(p, _):
    return torch.linspace(-1, 1, p.numel()).reshape(p.shape) + 0.5


def noise(p, generator):
    return torch.randn(p.shape, generator=generator)


def test_a_constant_gradient_is_all_signal_and_white_noise_has_none():
    assert (run(constant, steps=40).snr - 1).abs().max() < 1e-6
    snr = run(noise).snr
    # of n elements, the mean over about 50 steps; an average of m^2 would show 0.053
    assert snr.mean().abs() < 0.02 and snr.abs().max() < 0.05


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_mixture_shows_its_share_of_signal(share):
    def mixture(p, generator):
        return share**0.5 * constant(p, None).sign() + (1 - share) ** 0.5 * noise(p, generator)

    assert (run(mixture).snr - share).abs().max() < 0.08


def test_before_the_second_step_nothing_is_known():
    masks = run(constant, steps=1)
    assert masks.snr.tolist() == [[0, 0], [0, 0]] and masks.power.abs().max() == 0
    assert (run(constant, steps=2).snr - 1).abs().max() < 1e-6


def mixed(p, generator):
    """Shares of signal and noise that differ between layers and factors."""
    return constant(p, None) * (0.1 + p.shape[-1] / 16) + noise(p, generator)


@pytest.mark.parametrize("scale", [lambda step: 1e-3, lambda step: 65536.0], ids=["smaller", "larger"])
def test_the_size_of_gradients_does_not_matter(scale):
    """As clipping to a small norm makes them, each step alike."""
    assert relative_error(run(mixed, 60, scale).snr, run(mixed, 60).snr) <= 1e-4


def test_clipping_does_not_change_the_ranking():
    def train(clip):
        torch.manual_seed(3)
        model, masks, _ = build(mask_warmup=10**6)
        optimizer = MaskedAdamW(param_groups(model, 1e-4), masks=masks)
        generator = torch.Generator().manual_seed(2)
        for _ in range(60):
            x = torch.randn(16, 12, generator=generator)
            (model(x) - x[:, :1].sin()).square().mean().backward()
            if clip:
                nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
            optimizer.step()
            optimizer.zero_grad()
        return masks.snr

    free, clipped = train(False), train(True)
    assert torch.equal(free.flatten().argsort(), clipped.flatten().argsort())
    assert (free - clipped).abs().max() < 0.1


def test_a_scaler_changes_nothing():
    results = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        torch.manual_seed(3)
        model, masks, _ = build(mask_warmup=2, mask_interval=2)
        optimizer = MaskedAdamW(param_groups(model, 1e-3), masks=masks)
        generator = torch.Generator().manual_seed(2)
        for _ in range(20):
            loss = model(torch.randn(16, 12, generator=generator)).square().mean()
            if scaler is None:
                loss.backward()
                optimizer.step()
            else:
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
        results.append((masks.snr, masks.masks.clone()))
    assert relative_error(results[1][0], results[0][0]) <= 1e-5 and torch.equal(results[0][1], results[1][1])


def backward(model, seed=0):
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(seed))
    (model(x) - x[:, :1].sin()).square().mean().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_penalties_are_applied_beside_the_step(dtype):
    """p -= lr * coefficient * (gradient of the layer's own penalty); moments and statistics do not see them."""
    model, _, _ = build()
    model = model.to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    twin = copy.deepcopy(model)
    coefficients = {"orthogonality": 0.3, "spectral_consistency": 0.2}
    plain = MaskedAdamW(param_groups(model, 1e-2))
    both = MaskedAdamW(param_groups(twin, 1e-2), **coefficients)
    before = {name: p.detach().clone() for name, p in twin.named_parameters()}
    layers = 2  # the losses are means over them
    total = layers * (
        coefficients["orthogonality"] * orthogonality_loss(twin)
        + coefficients["spectral_consistency"] * spectral_consistency_loss(twin)
    )
    learning = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(total, learning.values(), allow_unused=True, materialize_grads=True)
    for m, dt in ((model, dtype), (twin, dtype)):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(0)).to(dt)
        (m(x) - x[:, :1].sin()).square().mean().backward()
    plain.step()
    both.step()
    rates = {id(p): g["lr"] for g in both.param_groups for p in g["params"]}
    for (name, p), grad, q in zip(learning.items(), grads, [p for p in model.parameters() if p.requires_grad]):
        moved = before[name] + (q.detach() - before[name]) - rates[id(p)] * grad
        assert relative_error(p, moved) <= (1e-6 if dtype == torch.float32 else 1e-12), name
        assert torch.equal(both.state[p]["exp_avg"], plain.state[q]["exp_avg"])
    orthogonality, spectral = both.penalties
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(before[name])
        assert relative_error(orthogonality, layers * orthogonality_loss(twin)) <= 1e-5
        assert relative_error(spectral, layers * spectral_consistency_loss(twin)) <= 1e-5


def test_penalties_never_move_a_masked_block():
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    model, masks, _ = build(lambda *_: mask, mask_warmup=0, mask_interval=1, mask_probe_interval=0)
    optimizer = MaskedAdamW(param_groups(model, 1e-2), masks=masks, orthogonality=1.0, spectral_consistency=1.0)
    backward(model)
    optimizer.step()
    held = model[0].u[3:].clone(), model[0].s[3:].clone(), model[2].v[:3].clone()
    moving = model[0].u[:3].clone()
    for seed in range(5):
        optimizer.zero_grad()
        backward(model, seed)
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(held, (model[0].u[3:], model[0].s[3:], model[2].v[:3])))
    assert not torch.equal(moving, model[0].u[:3])


def test_the_masks_follow_the_task_whatever_the_penalties():
    chosen = []
    for coefficient in (0.0, 1e-2):
        torch.manual_seed(7)
        model, masks, _ = build(mask_warmup=5, mask_interval=5, mask_active_fraction=0.5, mask_probe_interval=0)
        optimizer = MaskedAdamW(
            param_groups(model, 1e-4), masks=masks, orthogonality=coefficient, spectral_consistency=coefficient
        )
        for seed in range(5):
            optimizer.zero_grad()
            backward(model, seed)
            optimizer.step()
        chosen.append(masks.masks.clone())
        assert masks.history[0]["step"] == 5
    assert torch.equal(*chosen)


def test_penalties_that_are_not_finite_skip_the_step():
    model, _, _ = build()
    optimizer = MaskedAdamW(param_groups(model, 1e-3), orthogonality=1.0)
    with torch.no_grad():
        model[0].u[0, 0] = 1e30
    before = model[2].u.clone()
    backward(model)
    optimizer.step()
    assert optimizer.skipped_steps == 1 and torch.equal(model[2].u, before)


def test_coefficients_are_settings_of_a_group():
    model, _, _ = build()
    groups = param_groups(model, 1e-2)
    groups[0]["orthogonality"] = 0.5  # of u and v only
    optimizer = MaskedAdamW(groups, spectral_consistency=0.0)
    assert [g["orthogonality"] for g in optimizer.param_groups] == [0.5, 0.0, 0.0]
    again = MaskedAdamW(param_groups(model, 1e-2))
    again.load_state_dict(optimizer.state_dict())
    assert again.param_groups[0]["orthogonality"] == 0.5
    with pytest.raises(ValueError, match="invalid orthogonality: -1"):
        MaskedAdamW(param_groups(model, 1e-2), orthogonality=-1)


@pytest.mark.parametrize("key", ["amsgrad", "maximize", "fused"])
def test_a_key_of_a_group_that_is_not_known_is_refused(key):
    p = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=rf"holds \['{key}'\], which this optimizer does not know; it knows lr, betas"):
        MaskedAdamW([{"params": [p], key: True}])
