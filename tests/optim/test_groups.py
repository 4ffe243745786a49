"""Which parameters, layers and masks an optimizer may have."""

import copy

import pytest
import torch
from optimizer_runs import CONFIG, base
from torch import nn

from masm_ext import LayerMasks, MaskedAdamW, convert, param_groups


def test_masks_must_cover_the_layers_of_the_parameters():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    with pytest.raises(ValueError, match="1 layers that own parameters are not in masks="):
        MaskedAdamW(param_groups(model, 1e-2), masks=LayerMasks([model[0]], CONFIG))


def test_a_group_that_is_added_must_be_covered_too():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    optimizer = MaskedAdamW(model[4].parameters())
    with pytest.raises(ValueError, match="1 layers that own parameters are not in masks="):
        optimizer.add_param_group({"params": [model[0].u]})


def test_layers_have_one_optimizer():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    first = MaskedAdamW([p for layer in (model[0], model[2]) for p in (layer.u, layer.v)])
    second = MaskedAdamW([model[0].s, model[2].s])
    model(torch.randn(4, 12)).sum().backward()
    second.step()
    with pytest.raises(RuntimeError, match=r"another optimizer was made over these layers.*parameter groups"):
        first.step()
    masks = LayerMasks(model, CONFIG)
    shared = [MaskedAdamW([p], masks=masks) for p in (model[0].u, model[0].s)]
    shared[1].step()
    with pytest.raises(RuntimeError, match="one table counts the steps of one optimizer"):
        shared[0].step()


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    optimizer = MaskedAdamW(model[4].parameters())
    with pytest.raises(ValueError, match="not in masks="):
        optimizer.add_param_group({"params": (p for p in [model[0].u])})
    assert len(optimizer.param_groups) == 1
    model(torch.randn(4, 12)).sum().backward()
    optimizer.step()


def test_penalties_are_those_of_layers_that_the_optimizer_trains():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    with torch.no_grad():
        model[2].u.fill_(float("inf"))
    optimizer = MaskedAdamW([model[0].u], orthogonality=1e-2)
    model[0].u.grad = torch.ones_like(model[0].u)
    before = model[0].u.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 0 and not torch.equal(before, model[0].u)


def test_a_shallow_copy_that_shares_parameters_is_told_apart():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    twin = copy.copy(model[0])
    with pytest.raises(ValueError, match="belongs to 2 layers, of which one is a shallow copy"):
        MaskedAdamW(param_groups(model, 1e-3))
    assert MaskedAdamW(param_groups(model, 1e-3), masks=LayerMasks(model, CONFIG)).masks.layer_names == ("0", "2")
    del twin


def test_groups_of_an_older_state_get_the_settings_they_lack():
    p = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([p])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["orthogonality"], group["spectral_consistency"]
    optimizer.load_state_dict(state)
    p.grad = torch.ones(3)
    optimizer.step()
