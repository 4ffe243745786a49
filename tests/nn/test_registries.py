"""An entry of a registry works wherever its name is accepted."""

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
    masking,
    regularization_loss,
)
from masm_ext.masks import bias_variance
from masm_ext.registry import MASK_POLICIES, PENALTIES, Registry


@pytest.fixture
def odd_layers():
    @MASK_POLICIES.register("_test_odd_layers")
    def choose(snr, current, config, step):
        mask = torch.zeros_like(current)
        mask[1::2] = 1
        return mask

    yield
    del MASK_POLICIES._entries["_test_odd_layers"]


@pytest.fixture
def small_s():
    @PENALTIES.register("_test_small_s")
    def penalty(layer):
        return layer.s.square().sum() / 2

    yield
    del PENALTIES._entries["_test_small_s"]


def built(**fields):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    config = MASMConfig(target_modules=["0", "1", "2", "3"], num_subspaces=2, subspace_rank=2, **fields)
    convert(model, config, use_cache=False, progress=False)
    return model, config


def test_a_mask_policy_by_name(odd_layers):
    model, config = built(mask_policy="_test_odd_layers", mask_warmup=1, mask_interval=1, mask_probe_interval=0)
    optimizer = MaskedAdamW(model.parameters(), masks=LayerMasks(model, config))
    for _ in range(2):
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
    assert optimizer.masks.masks.tolist() == [[0, 0], [1, 1], [0, 0], [1, 1]]
    assert [entry["step"] for entry in optimizer.masks.history] == [1, 2]
    copied = copy.deepcopy(optimizer.masks)
    assert copied.config.mask_policy == "_test_odd_layers" and MASMConfig.from_dict(config.to_dict()) == config


def test_an_unknown_policy_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"one of .*'bias_variance'.*'static'.*'none'.*got '_test_odd_layers'"):
        MASMConfig(mask_policy="_test_odd_layers")


def test_a_penalty_by_name_in_the_loss(small_s):
    model, config = built()
    want = sum(layer.s.square().sum() / 2 for layer in model) / 4
    got = regularization_loss(model, config, {"_test_small_s": 3.0}) - regularization_loss(model, config)
    assert relative_error(got, 3 * want) < 1e-4
    with pytest.raises(ValueError, match=r"there is no penalty 'large_s'; there are .*_test_small_s"):
        regularization_loss(model, config, {"large_s": 1.0})


@pytest.mark.parametrize("orthogonality", [0.0, 0.3])
def test_a_penalty_by_name_in_the_optimizer_is_decoupled(small_s, orthogonality):
    model, _ = built()
    plain = copy.deepcopy(model)
    lr, coefficient = 1e-2, 0.5
    optimizers = [
        MaskedAdamW(m.parameters(), lr=lr, weight_decay=0.0, orthogonality=orthogonality, **more)
        for m, more in ((model, {"terms": {"_test_small_s": coefficient}}), (plain, {}))
    ]
    x, before = torch.randn(3, 8), [layer.s.detach().clone() for layer in model]
    for m, optimizer in zip((model, plain), optimizers):
        m(x).square().sum().backward()
        optimizer.step()
    for layer, other, s in zip(model, plain, before):
        assert torch.equal(layer.u, other.u) and torch.equal(layer.v, other.v)
        assert relative_error(other.s - layer.s, lr * coefficient * s) < 1e-4
        ours, theirs = optimizers[0].state[layer.s], optimizers[1].state[other.s]
        assert torch.equal(ours["exp_avg"], theirs["exp_avg"])


def test_terms_that_are_unknown_or_negative_are_refused(small_s):
    model, _ = built()
    with pytest.raises(ValueError, match="there is no penalty 'large_s'"):
        MaskedAdamW(model.parameters(), terms={"large_s": 1.0})
    with pytest.raises(ValueError, match="invalid terms"):
        MaskedAdamW(model.parameters(), terms={"_test_small_s": -1.0})


@pytest.mark.parametrize(
    "formula",
    [lambda layer: layer.s.sum() * float("inf"), lambda layer: (layer.u - layer.u0).square().sum().sqrt()],
    ids=["infinite", "zero with an infinite derivative"],
)
def test_a_penalty_that_is_not_finite_skips_the_step(formula):
    PENALTIES.register("_test_infinite")(formula)
    try:
        model, _ = built()
        optimizer = MaskedAdamW(model.parameters(), terms={"_test_infinite": 1.0})
        before = copy.deepcopy(model.state_dict())
        model(torch.randn(3, 8)).square().sum().backward()
        optimizer.step()
        assert optimizer.skipped_steps == 1
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items() if value.dim())
    finally:
        del PENALTIES._entries["_test_infinite"]


def test_a_name_is_entered_once():
    registry = Registry("colour")
    registry.register("red")(1)
    with pytest.raises(ValueError, match="a colour 'red' is registered already"):
        registry.register("red")
    with pytest.raises(ValueError, match="must be an identifier"):
        registry.register("dark red")
    assert list(registry) == ["red"] and "blue" not in registry and len(registry) == 1


def test_the_former_module_of_masks_still_serves():
    assert masking.bias_variance is bias_variance
