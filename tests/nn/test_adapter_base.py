"""An adapter is bound to every frozen tensor of its base, and nothing that was trained is left behind."""

import copy
import hashlib
import json

import pytest
import safetensors.torch
import torch
from torch import nn

from masm_ext import MASMConfig, convert, load_adapter, save_adapter
from masm_ext.adapter.files import AdapterError, digest_of, read_record
from masm_ext.base_model import record_base
from masm_ext.hashing import tensor_hashes, weight_hash

CONFIG = MASMConfig(target_modules=["a", "b"], modules_to_save="head", num_subspaces=2, subspace_rank=2)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.a, self.b = nn.Linear(12, 12), nn.Linear(12, 12)
        self.norm, self.batch_norm, self.head = nn.LayerNorm(12), nn.BatchNorm1d(12), nn.Linear(12, 1)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("shift", torch.zeros(12))
        self.register_buffer("places", torch.arange(4))
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x):
        x = self.batch_norm(self.b(torch.tanh(self.a(x))))
        return self.head(self.norm(x) * self.scale + self.shift)


def converted(config=CONFIG):
    model = Net()
    convert(model, config, use_cache=False, progress=False)
    return model


BOUND = ["a.bias", "b.bias", "norm.weight", "batch_norm.running_var", "scale", "shift"]


@pytest.mark.parametrize("name", ["a.weight", *BOUND])
def test_a_base_that_differs_in_one_frozen_tensor_is_refused(name, tmp_path):
    save_adapter(converted(), tmp_path)
    model = Net()
    with torch.no_grad():
        model.state_dict()[name].add_(1e-3)
    with pytest.raises(AdapterError, match=rf"1 of its tensors differ .*\({name}\); use the same"):
        load_adapter(model, tmp_path)
    assert type(model.a) is nn.Linear and model.norm.weight.requires_grad


def test_what_is_bound_and_what_is_not(tmp_path):
    save_adapter(converted(), tmp_path)
    assert set(BOUND) <= set(read_record(tmp_path)["base"])
    model = Net()
    with torch.no_grad():
        model.head.weight.add_(1)
    model.scratch.add_(1)
    model.places.add_(1)
    model.batch_norm.num_batches_tracked.add_(1)
    load_adapter(model, tmp_path)
    assert torch.equal(model.head.weight, Net().head.weight)


def test_a_base_with_other_tensors_is_another_architecture(tmp_path):
    save_adapter(converted(), tmp_path)
    model = Net()
    model.norm, model.extra = nn.Identity(), nn.Linear(2, 2)
    with pytest.raises(AdapterError, match=r"lacks 2 tensors .*norm\.bias, norm\.weight\) and has 2 .*extra\.bias"):
        load_adapter(model, tmp_path)
    model = Net()
    model.a = nn.Linear(12, 12, bias=False)
    with pytest.raises(AdapterError, match="a: the adapter's base had a bias, this model has none"):
        load_adapter(model, tmp_path)
    model = Net()
    model.norm.half()
    with pytest.raises(AdapterError, match=r"norm\.weight is float16, the adapter's base was float32"):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize("name", ["norm.weight", "a.bias", "scale"])
def test_a_trained_tensor_outside_the_adapter_is_an_error_that_lists_it(name, tmp_path):
    model = converted()
    model.get_parameter(name).requires_grad_(True)
    with pytest.raises(ValueError, match=rf"1 trainable parameters would not be saved: {name} \[.*modules_to_save"):
        save_adapter(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_biases_of_converted_layers_travel_with_train_bias(tmp_path):
    config = MASMConfig(**{**CONFIG.to_dict(), "train_bias": True})
    model = converted(config)
    with torch.no_grad():
        model.a.bias.add_(1)
    model.requires_grad_(False)  # as before an evaluation: what is saved does not depend on the flags
    save_adapter(model, tmp_path)
    fresh = Net()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.a.bias, model.a.bias) and fresh.a.bias.requires_grad
    assert "a.bias" not in read_record(tmp_path)["base"]


def test_frozen_tensors_that_changed_since_convert_are_an_error_that_lists_them(tmp_path):
    model = converted()
    with torch.no_grad():
        model.norm.weight.mul_(2)
    model.train()(torch.randn(8, 12))  # the running statistics move
    with pytest.raises(ValueError, match=r"3 frozen tensors changed .*norm\.weight, batch_norm.* eval mode"):
        save_adapter(model, tmp_path)
    record_base(model)
    save_adapter(model, tmp_path)
    with pytest.raises(AdapterError, match="3 of its tensors differ"):
        load_adapter(Net(), tmp_path)


def test_a_batch_norm_that_travels_may_move(tmp_path):
    config = MASMConfig(**{**CONFIG.to_dict(), "modules_to_save": ["head", "batch_norm"]})
    model = converted(config)
    model.train()(torch.randn(8, 12))
    save_adapter(model, tmp_path)
    fresh = Net()
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh.batch_norm.running_mean, model.batch_norm.running_mean)
    assert int(fresh.batch_norm.num_batches_tracked) == 1


def test_what_was_loaded_is_remembered_for_the_next_save(tmp_path):
    save_adapter(converted(), tmp_path / "first")
    model = Net()
    load_adapter(model, tmp_path / "first")
    model = copy.deepcopy(model)
    with torch.no_grad():
        model.shift.add_(1)
    with pytest.raises(ValueError, match=r"1 frozen tensors changed .*: shift"):
        save_adapter(model, tmp_path / "second")


def test_a_part_of_a_model_that_was_converted_is_watched_in_the_whole(tmp_path):
    """convert() was given the backbone, save_adapter the detector around it."""
    whole = nn.ModuleDict({"backbone": Net(), "top": nn.Linear(3, 3)})
    convert(whole["backbone"], CONFIG, use_cache=False, progress=False)
    whole["top"].requires_grad_(False)
    with pytest.raises(ValueError, match="or config="):
        save_adapter(whole, tmp_path)
    save_adapter(whole, tmp_path, config=CONFIG)
    load_adapter(nn.ModuleDict({"backbone": Net(), "top": copy.deepcopy(whole["top"])}), tmp_path)
    whole["backbone"].shift.add_(1)
    with pytest.raises(ValueError, match=r"1 frozen tensors changed .*backbone\.shift"):
        save_adapter(whole, tmp_path, config=CONFIG)


def test_a_cast_model_is_saved_for_the_base_it_came_from(tmp_path):
    model = converted()
    model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="cast since convert.*from float32 to bfloat16"):
        save_adapter(model, tmp_path)
    fresh = Net()
    load_adapter(fresh, tmp_path)
    x = torch.randn(5, 12).bfloat16()
    assert torch.equal(fresh.to(torch.bfloat16).eval()(x), model.eval()(x))


def test_an_adapter_of_version_1_loads_with_a_warning(tmp_path):
    """As version 1 wrote it: no base, and a plain pattern of modules_to_save named every suffix."""

    class Two(Net):
        def __init__(self):
            super().__init__()
            self.tower = nn.ModuleDict({"head": nn.Linear(2, 2)})

    model = Two()
    convert(model, CONFIG, use_cache=False, progress=False)
    save_adapter(model, tmp_path)
    path, tensors_path = tmp_path / "adapter.json", next(tmp_path.glob("*.safetensors"))
    tensors = safetensors.torch.load(tensors_path.read_bytes())
    tensors |= {"saved.tower.head.weight": torch.ones(2, 2), "saved.tower.head.bias": torch.ones(2)}
    tensors_path.write_bytes(data := safetensors.torch.save(tensors))
    record = json.loads(path.read_text())
    del record["base"], record["saved_modules"]
    for entry in record["layers"].values():
        del entry["shape"], entry["bias"]
    record |= {"format_version": 1, "masks": [[1.0, 0.0], [0.5, 1.0]]}
    record["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps({**record, "sha256": digest_of(record)}))
    fresh = Two()
    with torch.no_grad():
        fresh.norm.weight.add_(1)  # not looked at
    with pytest.warns(UserWarning, match="version 1, which is bound to the weights of the converted layers only"):
        load_adapter(fresh, tmp_path)
    assert fresh.a.mask.tolist() == [True, False] and fresh.b.mask.tolist() == [True, True]
    assert fresh.tower["head"].weight.min() == 1 and fresh.tower["head"].weight.requires_grad
    other = Two()
    with torch.no_grad():
        other.a.weight.add_(1)
    with pytest.raises(AdapterError, match=r"\(a\.weight\)"), pytest.warns(UserWarning):
        load_adapter(other, tmp_path)


def test_hashes_of_many_tensors_are_those_of_each(monkeypatch):
    t = torch.randn(6, 4)
    tensors = {"big": torch.randn(50, 3), "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 3), "t": t, "again": t}
    tensors |= {"strided": t.mT, "flags": torch.tensor([True, False]), "narrow": t.to(torch.float8_e4m3fn)}
    want = {name: weight_hash(value) for name, value in tensors.items()}
    hashed = []
    monkeypatch.setattr("masm_ext.hashing.weight_hash", lambda value: hashed.append(value) or weight_hash(value))
    assert tensor_hashes(tensors) == want and len(hashed) == len(tensors) - 1
    assert len(set(want.values())) == len(tensors) - 1 and tensor_hashes({}) == {}
