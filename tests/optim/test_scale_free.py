"""Rates that say what a step does to a layer of any width, rank and norm."""

import math

import pytest
import torch
from torch import nn

from masm_ext import MaskedAdamW, MASMConfig, convert, quantize, scale_free_groups

CONFIG = dict(target_modules=["0"], modules_to_save="1", num_subspaces=1, orthogonality=0, spectral_consistency=0)


def model_of(width, rank, gain, directions="random"):
    torch.manual_seed(width + rank)
    model = nn.Sequential(nn.Linear(width, width), nn.Linear(width, 1))
    with torch.no_grad():
        model[0].weight.mul_(gain)
    config = MASMConfig(subspace_rank=rank, directions=directions, **CONFIG)
    convert(model, config, use_cache=False, progress=False)
    return model


def test_groups_hold_every_parameter_once_with_the_stated_rates():
    model = model_of(24, 3, 2.0)
    weight_norm = float(model[0].folded_weight().norm())
    groups = scale_free_groups(model, 1e-2, u_lr_scale=1, v_lr_scale=1, s_lr=1e-3, head_lr=5e-3, head_weight_decay=0.1)
    by_name = {group["name"]: group for group in groups}
    assert by_name["uv"]["lr"] == pytest.approx(1e-2 / math.sqrt(24))
    assert by_name["s"]["lr"] == pytest.approx(1e-3 * weight_norm / math.sqrt(3), rel=1e-5)
    assert (by_name["head"]["lr"], by_name["head"]["weight_decay"]) == (5e-3, 0.1)
    assert by_name["uv"]["weight_decay"] == by_name["s"]["weight_decay"] == 0
    params = [id(p) for group in groups for p in group["params"]]
    assert sorted(params) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    with pytest.raises(ValueError, match="no trainable parameter"):
        scale_free_groups(nn.Linear(2, 2).requires_grad_(False))


def test_a_rectangular_layer_has_a_group_for_each_width():
    model = nn.Sequential(nn.Linear(8, 32), nn.Linear(32, 1))
    convert(model, MASMConfig(subspace_rank=2, **CONFIG), use_cache=False, progress=False)
    uv = [group for group in scale_free_groups(model, 1.0, u_lr_scale=1, v_lr_scale=1) if group["name"] == "uv"]
    assert sorted((group["params"][0].shape[1], group["lr"]) for group in uv) == [
        (8, pytest.approx(1 / math.sqrt(8))),
        (32, pytest.approx(1 / math.sqrt(32))),
    ]


def test_u_and_v_may_have_rates_of_their_own():
    model = model_of(24, 3, 1.0)
    groups = scale_free_groups(model, 1e-2, u_lr_scale=7.0, v_lr_scale=3.0)
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rates[id(model[0].u)] == pytest.approx(7e-2 / math.sqrt(24))
    assert rates[id(model[0].v)] == pytest.approx(3e-2 / math.sqrt(24))


@pytest.mark.parametrize("directions, lift", [("trailing", 0.02), ("trailing", 1.0), ("random", 0.3), ("leading", 0.5)])
def test_a_step_of_u_moves_the_weight_by_its_rate_whatever_the_singular_values(directions, lift):
    sizes = []
    for width, rank in ((32, 2), (96, 2), (96, 12)):
        torch.manual_seed(width + rank)
        model = nn.Sequential(nn.Linear(2 * width, width), nn.Linear(width, 1))
        config = MASMConfig(subspace_rank=rank, directions=directions, lift=lift, **CONFIG)
        convert(model, config, use_cache=False, progress=False)
        before = model[0].folded_weight().double()
        optimizer = MaskedAdamW(scale_free_groups(model, 1e-3))
        model[0].u.grad = torch.randn_like(model[0].u).sign()
        optimizer.step()
        sigma_rms = before.norm() / width**0.5
        moved = (model[0].folded_weight().double() - before).norm() / sigma_rms
        sizes.append(float(moved) / rank**0.5)
    assert sizes == pytest.approx([1e-3] * 3, rel=0.02)


@pytest.mark.parametrize("lift, s_lr", [(0.0, 1e-3), (0.02, 1e-5)])
def test_without_a_lift_u_turns_as_v_and_s_has_the_larger_rate(lift, s_lr):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    convert(model, MASMConfig(subspace_rank=2, lift=lift, **CONFIG), use_cache=False, progress=False)
    rates = {id(p): group["lr"] for group in scale_free_groups(model) for p in group["params"]}
    assert rates[id(model[0].s)] == pytest.approx(s_lr * model[0].base_norm() / math.sqrt(2))
    assert (rates[id(model[0].u)] == 2 * rates[id(model[0].v)]) == (lift == 0)


def test_a_layer_with_a_frozen_weight_in_8_bits_has_the_same_rates():
    pytest.importorskip("torchao")
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    convert(model, MASMConfig(subspace_rank=2, lift=0.02, **CONFIG), use_cache=False, progress=False)
    exact = [group["lr"] for group in scale_free_groups(model)]
    quantize(model, "int8")
    assert [group["lr"] for group in scale_free_groups(model)] == pytest.approx(exact, rel=1e-2)


def moved(width, rank, gain, groups):
    """||dW|| / ||W|| after 20 steps of sign-like gradients."""
    model = model_of(width, rank, gain)
    optimizer = MaskedAdamW(groups(model))
    generator = torch.Generator().manual_seed(0)
    signs = [torch.randn(p.shape, generator=generator).sign() for p in model.parameters() if p.requires_grad]
    for _ in range(20):
        for p, sign in zip((p for p in model.parameters() if p.requires_grad), signs):
            p.grad = sign
        optimizer.step()
    return model[0].relative_update()


def test_the_same_rates_move_any_layer_by_the_same_share():
    shapes = [(24, 3, 1.0), (96, 3, 1.0), (96, 12, 0.1), (48, 6, 7.0)]
    only_s = [moved(*shape, lambda m: scale_free_groups(m, 0.0, s_lr=2e-3)) for shape in shapes]
    # the singular values all move together: 20 steps of 0.2%
    assert only_s == pytest.approx([0.04] * 4, rel=0.05)
    from masm_ext import param_groups

    absolute = [moved(*shape, lambda m: param_groups(m, 0.0 + 1e-12, s_lr_scale=1e10)) for shape in shapes]
    assert max(absolute) > 5 * min(absolute)  # the control: absolute rates do not
