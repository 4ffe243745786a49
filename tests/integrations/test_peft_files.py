"""Adapters of PEFT on disk: saved, loaded, converted to and from save_adapter, and refused on another base."""

import json

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra masm_ext[peft]")
from peft import PeftConfig, PeftModel, get_peft_model
from peft_models import SETTINGS, base, batch, disturb, train, tuned
from tolerances import RELATIVE, relative_error

from masm_ext import (
    AdapterError,
    LayerMasks,
    MASMConfig,
    convert,
    load_adapter,
    save_adapter,
    weight_gradients,
)
from masm_ext.integrations.peft import MASMTunerConfig, adapter_to_peft, peft_to_adapter
from masm_ext.nn.masm_linear import masm_layers


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("options", [{}, {"energy": 0.2}, {"directions": "random", "train_bias": True, "lift": 0.5}])
def test_a_saved_adapter_loads_bit_for_bit_without_svd(seed, tmp_path, monkeypatch, options, low_cpu_mem_usage):
    model = tuned(seed, **options)
    disturb(model)
    next(iter(masm_layers(model).values())).mask[1] = False
    model.save_pretrained(tmp_path / "saved")
    monkeypatch.setattr("torch.linalg.svd", None)
    again = PeftModel.from_pretrained(base(seed), tmp_path / "saved", low_cpu_mem_usage=low_cpu_mem_usage)
    x = torch.randn(9, 32)
    assert torch.equal(again(x), model(x))
    for old, new in zip(masm_layers(model).values(), masm_layers(again).values()):
        assert torch.equal(old.mask, new.mask) and old.directions == new.directions and old.ranks == new.ranks
        assert all(torch.equal(old.state_dict()[k], new.state_dict()[k]) for k in old.state_dict())
    assert not any(p.requires_grad for p in again.parameters())


def test_an_adapter_of_another_base_is_refused(seed, tmp_path):
    """Unless the config turns the check off; a state_dict is checked, too."""
    model = tuned(seed)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="0: the weight differs from the one that the adapter was trained on"):
        PeftModel.from_pretrained(base(seed + 1), tmp_path)
    with pytest.raises(ValueError, match="trained on a base in float32, the weight here is bfloat16"):
        PeftModel.from_pretrained(base(seed, torch.bfloat16), tmp_path)
    narrow = base(seed)
    narrow[2] = nn.Linear(64, 48)
    with pytest.raises(ValueError, match=r"without bias, the weight here is .* with bias: another architecture"):
        PeftModel.from_pretrained(narrow, tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    config.check_base = False
    other = PeftModel.from_pretrained(base(seed + 1), tmp_path, config=config)
    x = torch.ones(1, 32)  # an adapter that was not trained adds nothing to any base
    assert relative_error(other.base_model.model[0](x), base(seed + 1)[0](x)) <= RELATIVE[torch.float32]
    with pytest.raises(ValueError, match="was trained on a weight with SHA-256"):
        tuned(seed + 1).load_state_dict(model.state_dict())
    origin = {name: value for name, value in model.state_dict().items() if name.endswith("_extra_state")}
    with pytest.raises(ValueError, match="was trained on a weight with SHA-256"):  # also without factors beside it
        tuned(seed + 1).load_state_dict(origin, strict=False)
    with pytest.raises(ValueError, match=r"has lift=0\.0 in its config, but the state of .* was trained with 0\.5"):
        tuned(seed).load_state_dict(tuned(seed, lift=0.5).state_dict())


def test_a_config_serves_several_models(seed, tmp_path):
    config = MASMTunerConfig(target_modules=["0"], **SETTINGS)
    models = [get_peft_model(base(seed + i), config) for i in range(2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i))
    hashes = [json.loads((tmp_path / f"{i}/adapter_config.json").read_text())["layers"]["0"] for i in range(2)]
    assert hashes[0]["base_sha256"] != hashes[1]["base_sha256"]
    x = torch.randn(3, 32)
    for i in range(2):
        assert torch.equal(PeftModel.from_pretrained(base(seed + i), tmp_path / str(i))(x), models[i](x))
    assert config.layers is None


def test_factors_that_were_not_loaded_are_refused(seed, tmp_path):
    tuned(seed).save_pretrained(tmp_path)
    config = PeftConfig.from_pretrained(tmp_path)
    model = get_peft_model(base(seed), config)
    with pytest.raises(ValueError, match=r"its factors were not loaded.*config.layers = None for a new adapter"):
        model(torch.ones(1, 32))
    config.layers = None
    assert get_peft_model(base(seed), config)(torch.ones(1, 32)).isfinite().all()


@pytest.mark.parametrize("train_bias", [False, True])
def test_folders_are_converted_both_ways_bit_for_bit(seed, tmp_path, train_bias):
    config = MASMConfig(target_modules=["0", "2"], modules_to_save=["4"], train_bias=train_bias, **SETTINGS)
    plain = base(seed)
    convert(plain, config, progress=False)
    train(plain, config, seed, 9)
    save_adapter(plain, tmp_path / "own")
    adapter_to_peft(tmp_path / "own", tmp_path / "peft")
    model = PeftModel.from_pretrained(base(seed), tmp_path / "peft")
    x = torch.randn(9, 32)
    assert relative_error(model(x), plain(x)) <= 3 * RELATIVE[torch.float32]
    assert any(not layer.mask.all() for layer in masm_layers(model).values())
    model.save_pretrained(tmp_path / "saved again")
    for folder in ("peft", "saved again"):
        peft_to_adapter(tmp_path / folder, base(seed), tmp_path / "back")
        back = base(seed)
        load_adapter(back, tmp_path / "back")
        assert torch.equal(back(x), plain(x))
        own, loaded = plain.state_dict(), back.state_dict()
        assert own.keys() == loaded.keys()
        assert all(torch.equal(own[k], loaded[k]) for k in own if not k.endswith("_extra_state"))
        assert [m.directions for m in masm_layers(plain).values()] == [m.directions for m in masm_layers(back).values()]
    with pytest.raises(AdapterError, match="differ from those the adapter was trained on"):
        peft_to_adapter(tmp_path / "peft", base(seed + 1), tmp_path / "wrong")
    with pytest.raises(ValueError, match="the weight differs"):
        PeftModel.from_pretrained(base(seed + 1), tmp_path / "peft")
    assert not (tmp_path / "wrong").exists()


def test_directions_of_the_gradient_enter_peft_through_a_folder(seed, tmp_path):
    config = MASMConfig(target_modules=["0"], directions="gradient", lift=0.5, num_subspaces=2, subspace_rank=2)
    model = base(seed)
    gradients = weight_gradients(
        model, config, [batch(seed, i) for i in range(3)], lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    )
    convert(model, config, gradients=gradients, progress=False)
    disturb(model)
    save_adapter(model, tmp_path / "own")
    adapter_to_peft(tmp_path / "own", tmp_path / "peft")
    x = torch.randn(9, 32)
    loaded = PeftModel.from_pretrained(base(seed), tmp_path / "peft")
    assert relative_error(loaded(x), model(x)) <= 3 * RELATIVE[torch.float32]


def test_the_adapters_of_transformers_itself(seed, tmp_path):
    """``PreTrainedModel.add_adapter`` and ``load_adapter``, which set tensors without a state_dict."""
    transformers = pytest.importorskip("transformers")

    def bert():
        torch.manual_seed(seed)
        shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=40, **shape)).eval()

    ids = torch.randint(0, 40, (2, 5))
    before = bert()(ids).logits
    model = bert()
    model.add_adapter(MASMTunerConfig(target_modules=["query", "value"], num_subspaces=2, subspace_rank=2, lift=1.0))
    disturb(model)
    expected = model(ids).logits
    assert relative_error(expected, before) > 1e-4
    model.save_pretrained(tmp_path)
    again = bert()
    again.load_adapter(str(tmp_path))
    assert torch.equal(again(ids).logits, expected)
    assert torch.equal(PeftModel.from_pretrained(bert(), tmp_path).eval()(ids).logits, expected)
    again.disable_adapters()
    assert torch.equal(again(ids).logits, before)


def test_a_loaded_adapter_trains_on_with_a_new_optimizer(seed, tmp_path):
    model = tuned(seed)
    masks = train(model, model.peft_config["default"].masm_config(), seed, 9)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(seed), tmp_path, is_trainable=True)
    found = LayerMasks(again, again.peft_config["default"].masm_config())
    assert torch.equal(found.masks > 0, masks.masks > 0) and not found.masks.all()
    before = [layer.s.clone() for layer in masm_layers(again).values()]
    train(again, again.peft_config["default"].masm_config(), seed, 2)
    assert any(not torch.equal(s, layer.s) for s, layer in zip(before, masm_layers(again).values()))
