"""MASM as a method of PEFT, compared with convert() and with dense products in float64."""

import copy
import dataclasses

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra masm_ext[peft]")
from peft import get_peft_model
from peft_models import SETTINGS, base, batch, disturb, train, tuned
from tolerances import GRADIENT, RELATIVE, relative_error

from masm_ext import (
    LayerMasks,
    MaskedAdamW,
    MASMConfig,
    MASMLinear,
    convert,
    merge,
    param_groups,
    regularization_loss,
    save_adapter,
    scale_free_groups,
)
from masm_ext.integrations.peft import MASMTunerConfig
from masm_ext.nn.masm_linear import masm_layers


def test_defaults_are_those_of_the_library():
    own = {f.name: f.default for f in dataclasses.fields(MASMTunerConfig)}
    shared = [f for f in dataclasses.fields(MASMConfig) if not f.name.endswith("_modules") and f.name in own]
    assert {f.name: own[f.name] for f in shared if f.name != "modules_to_save"} == {
        f.name: f.default for f in shared if f.name != "modules_to_save"
    }
    assert not {f.name for f in dataclasses.fields(MASMConfig)} - set(own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("lift", [0.0, 1.0])
def test_output_at_the_start_is_that_of_the_base(seed, dtype, lift):
    x = torch.randn(9, 32, dtype=dtype)
    expected = base(seed, dtype)(x)
    assert relative_error(tuned(seed, dtype, lift=lift)(x), expected) <= RELATIVE[dtype]


def test_outputs_and_gradients_against_dense_weights(seed):
    """Two active adapters of different ranks: the sum of what both add to W, by autograd in float64."""
    model = tuned(seed, modules_to_save=None, lift=0.5)
    model.add_adapter("second", MASMTunerConfig(target_modules=["0"], num_subspaces=2, subspace_rank=[1, 5]))
    model.base_model.set_adapter(["default", "second"])
    disturb(model)
    tuner = model.base_model.model[0]
    x, dy = torch.randn(17, 32, requires_grad=True), torch.randn(17, 64)
    tuner(x).backward(dy)
    leaves = {}
    weight = tuner.base_layer.weight.detach().double()
    for name, layer in tuner.masm_subspaces.items():
        u, s, v = leaves[name] = [t.detach().double().requires_grad_(True) for t in (layer.u, layer.s, layer.v)]
        initial = layer.u0.double().T @ torch.diag(layer.s0.double()) @ layer.v0.double()
        weight = weight + u.T @ torch.diag(s) @ v - initial
    wide = x.detach().double().requires_grad_(True)
    y = wide @ weight.T + tuner.base_layer.bias.detach().double()
    y.backward(dy.double())
    assert relative_error(tuner(x), y) <= RELATIVE[torch.float32]
    assert relative_error(x.grad, wide.grad) <= GRADIENT[torch.float32]
    for name, layer in tuner.masm_subspaces.items():
        for found, expected in zip((layer.u, layer.s, layer.v), leaves[name]):
            assert relative_error(found.grad, expected.grad) <= GRADIENT[torch.float32]


def test_training_is_that_of_convert(seed):
    """Masks, penalties, groups and the optimizer see the same layers: the two runs differ by rounding."""
    config = MASMConfig(target_modules=["0", "2"], modules_to_save=["4"], **SETTINGS)
    plain = base(seed)
    convert(plain, config, progress=False)
    model = tuned(seed)
    masks = train(model, model.peft_config["default"].masm_config(), seed, 14)
    expected = train(plain, config, seed, 14)
    assert len(masks.history) == len(expected.history) > 1
    assert torch.equal(masks.masks, expected.masks) and not masks.masks.all()
    x, _ = batch(seed, 99)
    assert relative_error(model(x), plain(x)) <= 1e-3  # Adam's first steps divide by tiny second moments
    assert relative_error(model(x), base(seed)(x)) > 0.1
    losses = [float(regularization_loss(m, config).detach()) for m in (model, plain)]
    assert losses[0] > 0 and abs(losses[0] - losses[1]) <= 1e-3 * losses[1]


def test_a_masked_block_stays_bit_for_bit(seed):
    model = tuned(seed)
    layer = model.base_model.model[0].masm_subspaces["default"]
    layer.mask[1] = False
    before = {name: getattr(layer, name)[4:8].clone() for name in "usv"}
    optimizer = MaskedAdamW(param_groups(model, 1e-2, weight_decay=0.1))
    for step in range(3):
        x, y = batch(seed, step)
        nn.functional.cross_entropy(model(x), y).backward()
        assert not layer.u.grad[4:8].any() and layer.u.grad[:4].any()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(getattr(layer, name)[4:8], value) for name, value in before.items())
    assert not torch.equal(layer.s[:4], layer.s0[:4])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_comes_back_bit_for_bit(seed, dtype):
    x = torch.randn(9, 32, dtype=dtype)
    model = tuned(seed, dtype, train_bias=True, modules_to_save=None)
    weights = {k: v.clone() for k, v in base(seed, dtype).state_dict().items()}
    expected = base(seed, dtype)(x)
    disturb(model)
    model.base_model.model[0].masm_subspaces["default"].bias.data += 1
    with_adapter = model(x)
    assert not torch.allclose(with_adapter, expected, atol=1e-2)
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    model.merge_adapter()
    assert relative_error(model(x), with_adapter) <= 3 * RELATIVE[dtype]
    with model.disable_adapter():
        assert torch.equal(model(x), expected)
    assert torch.equal(model(x), with_adapter)
    model.add_adapter("second", MASMTunerConfig(target_modules=["2"], **SETTINGS))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert torch.equal(model.base_model.model[0](x), base(seed, dtype)[0](x))
    model.merge_adapter()
    restored = model.unload()
    assert {k: v.shape for k, v in restored.state_dict().items()} == {k: v.shape for k, v in weights.items()}
    assert all(torch.equal(value, weights[name]) for name, value in restored.state_dict().items())


def test_merge_and_unload_gives_plain_layers(seed):
    model = tuned(seed)
    disturb(model)
    x = torch.randn(9, 32)
    expected = model(x)
    merged = model.merge_and_unload()
    assert not any(isinstance(m, MASMLinear) for m in merged.modules()) and type(merged[0]) is nn.Linear
    assert relative_error(merged(x), expected) <= 3 * RELATIVE[torch.float32]


def test_only_active_adapters_are_masked_and_penalized(seed):
    model = tuned(seed)
    first = masm_layers(model)
    model.add_adapter("second", MASMTunerConfig(target_modules=["2"], **{**SETTINGS, "num_subspaces": 2}))
    assert masm_layers(model) == first and list(first) == [
        f"base_model.model.{i}.masm_subspaces.default" for i in (0, 2)
    ]
    model.set_adapter("second")
    [name] = masm_layers(model)
    assert name.endswith("2.masm_subspaces.second")
    assert LayerMasks(model, model.peft_config["second"].masm_config()).masks.shape == (1, 2)
    uv, s = param_groups(model, 1e-3)[:2]
    assert len(uv["params"]) == 2 and len(s["params"]) == 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_subspaces": 0}, "num_subspaces must be at least 1, got 0"),
        ({"directions": "gradient", "lift": 1.0}, "needs gradients that PEFT has no way to pass"),
        ({"mask_policy": "static"}, "selects layers before they are adapted"),
        ({"target_modules": ".*0", "layers_to_transform": [1]}, "needs target_modules in a list"),
        ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(ValueError, match=message):
        MASMTunerConfig(**{"target_modules": ["0"], **wrong})


def test_wrong_layers(seed):
    with pytest.raises(ValueError, match=r"0: 3 subspaces of ranks .* but q = min"):
        tuned(seed, subspace_rank=30)
    with pytest.raises(TypeError, match="'1' is a Tanh"):
        tuned(seed, target_modules=["1"])
    shared = base(seed)
    shared[2].weight = nn.Parameter(shared[2].weight[:, :64].clone())
    shared.append(shared[2].__class__(64, 48))
    shared[5].weight = shared[2].weight
    with pytest.raises(ValueError, match="shares its weight"):
        get_peft_model(shared, MASMTunerConfig(target_modules=["2"], **SETTINGS))


def test_bfloat16_and_autocast_keep_small_updates(seed):
    """The change of y, not y itself, against float64: what folding into a bfloat16 weight would lose."""
    x = torch.randn(64, 32)
    for dtype in (torch.bfloat16, torch.float32):
        model = tuned(seed, dtype, target_modules=["0"], modules_to_save=None)
        tuner = model.base_model.model[0]
        layer = tuner.masm_subspaces["default"]
        assert layer.u.dtype == layer.s.dtype == torch.float32
        with torch.no_grad():
            layer.s.add_(torch.randn_like(layer.s), alpha=0.05)
        given = x.to(torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
            y = tuner(given if dtype == torch.bfloat16 else x)
        assert y.dtype == torch.bfloat16
        weight = tuner.base_layer.weight.to(torch.bfloat16).double() + tuner.get_delta_weight("default").double()
        expected = given.double() @ weight.T + tuner.base_layer.bias.to(torch.bfloat16).double()
        assert relative_error(y, expected) <= RELATIVE[torch.bfloat16]


def test_a_copy_is_on_its_own(seed):
    model = tuned(seed)
    twin = copy.deepcopy(model)
    disturb(twin)
    for mine, other in zip(masm_layers(model).values(), masm_layers(twin).values()):
        assert other.tuner is not mine.tuner and other.tuner.masm_subspaces["default"] is other
        assert torch.equal(mine.s, mine.s0) and not torch.equal(other.s, other.s0)
    model.add_adapter("second", MASMTunerConfig(target_modules=["0"], **SETTINGS))
    model.set_adapter("second")
    assert len(masm_layers(twin)) == 2 and len(masm_layers(model)) == 1


def test_conversion_to_lora_is_exact_at_twice_the_rank(seed):
    from peft import convert_to_lora, set_peft_model_state_dict

    model = tuned(seed, modules_to_save=None)
    disturb(model)
    x = torch.randn(9, 32)
    config, state = convert_to_lora(model, rank=24)
    lora = get_peft_model(base(seed), config)
    set_peft_model_state_dict(lora, state)
    assert relative_error(lora(x), model(x)) <= 1e-4  # PEFT's SVD of the change is in float32


def test_the_principal_part_follows_the_model(seed):
    """Kept once a penalty has read it, and not over a move, a merge or another base."""
    model = tuned(seed)
    layer = next(iter(masm_layers(model).values()))
    kept = layer.principal
    assert layer.principal is kept and "principal" not in layer.state_dict()
    expected = layer.base_weight.double() - (layer.u0.double().T * layer.s0.double()) @ layer.v0.double()
    assert relative_error(kept, expected) <= RELATIVE[torch.float32]
    model.merge_adapter()
    assert torch.equal(layer.principal, kept)
    model.unmerge_adapter()
    with torch.no_grad():
        layer.base_weight.mul_(2)
    assert relative_error(layer.principal, expected + layer.base_weight.double() / 2) <= RELATIVE[torch.float32]
    model.to(torch.bfloat16)
    assert layer._principal is None  # its memory is free
    assert layer.principal.dtype == torch.bfloat16 and layer.s.dtype == torch.float32


def test_merging_one_after_the_other_is_merging_together(seed):
    model = tuned(seed, modules_to_save=None)
    model.add_adapter("second", MASMTunerConfig(target_modules=["0"], **SETTINGS))
    model.base_model.set_adapter(["default", "second"])
    disturb(model)
    layer = model.base_model.model[0].base_layer
    before = layer.weight.clone()
    model.merge_adapter()
    together = layer.weight.clone()
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)
    model.merge_adapter(["default"])
    assert not torch.equal(layer.weight, together)
    model.merge_adapter(["second"])
    assert torch.equal(layer.weight, together)
    model.unmerge_adapter()
    assert torch.equal(layer.weight, before)


def test_functions_for_converted_models_refuse_adapters_of_peft(seed, tmp_path):
    model = tuned(seed)
    with pytest.raises(ValueError, match=r"use its merge_and_unload\(\)"):
        merge(model)
    with pytest.raises(ValueError, match=r"use its save_pretrained, and .*peft_to_adapter"):
        save_adapter(model, tmp_path / "own", config=MASMConfig(**SETTINGS))
    with pytest.raises(ValueError, match="converted already"):
        convert(model, MASMConfig(target_modules=["4"], **SETTINGS))
    assert not (tmp_path / "own").exists()
    disturb(model)
    x = torch.randn(5, 32)
    for index in (0, 2):  # with and without a bias in the base
        tuner = model.base_model.model[index]
        given = x if index == 0 else torch.randn(5, 64)
        linear = tuner.masm_subspaces["default"].to_linear()
        assert relative_error(linear(given), tuner(given)) <= 3 * RELATIVE[torch.float32]


def test_compiled_without_a_graph_break(seed):
    model = tuned(seed)
    disturb(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(5, 32)
    compiled(x).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model(x).sum().backward()
    assert len(grads) == 2 * 3 + 2
    for name, p in model.named_parameters():
        assert p.grad is None or relative_error(grads[name], p.grad) <= GRADIENT[torch.float32]


@pytest.mark.parametrize("lift", [0.0, 0.02])
def test_scale_free_rates_are_those_of_convert(seed, lift):
    plain = base(seed)
    config = MASMConfig(target_modules=["0", "2"], modules_to_save=["4"], lift=lift, **SETTINGS)
    convert(plain, config, progress=False)
    expected, found = ([(g["name"], g["lr"]) for g in scale_free_groups(m)] for m in (plain, tuned(seed, lift=lift)))
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [lr for _, lr in found] == pytest.approx([lr for _, lr in expected], rel=1e-5)
