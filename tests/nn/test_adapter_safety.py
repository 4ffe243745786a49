"""A failed save keeps the earlier adapter, and a failed load keeps the model."""

import copy
import dataclasses
import hashlib
import json

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from masm_ext import LayerMasks, MASMConfig, MASMLinear, convert, load_adapter, merge, save_adapter
from masm_ext.adapter.files import AdapterError, digest_of
from masm_ext.decomposition import Decomposition

CONFIG = MASMConfig(target_modules=["a", "b"], modules_to_save="head", num_subspaces=2, subspace_rank=2)


class Net(nn.Module):
    def __init__(self, dim=12):
        super().__init__()
        torch.manual_seed(3)
        self.a, self.b = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 1)

    def forward(self, x):
        return self.head(self.norm(self.b(torch.tanh(self.a(x)))))


def converted(config=CONFIG, model=None):
    model = Net() if model is None else model
    convert(model, config, use_cache=False, progress=False)
    return model


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    save_adapter(converted(), tmp_path)
    return tmp_path


def other_model_masks():
    config = MASMConfig(target_modules="0", num_subspaces=2, subspace_rank=2)
    return LayerMasks(converted(config, nn.Sequential(nn.Linear(12, 12))), config)


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda m, f: save_adapter(m, f, masks=other_model_masks()), "1 layers of another model, this one has 2"),
        (lambda m, f: save_adapter(m, f, masks=LayerMasks(copy.deepcopy(m), CONFIG)), "another model"),
        (
            lambda m, f: save_adapter(m, f, config=dataclasses.replace(CONFIG, num_subspaces=3)),
            "num_subspaces is 3, but 'a' has 2",
        ),
        (
            lambda m, f: save_adapter(m, f, config=dataclasses.replace(CONFIG, subspace_rank=3)),
            r"ranks \[3, 3\], but 'a' has \[2, 2\]",
        ),
        (
            lambda m, f: save_adapter(m, f, config=dataclasses.replace(CONFIG, train_bias=True)),
            "train_bias is True, but the model was converted with False",
        ),
        (
            lambda m, f: save_adapter(m, f, config=dataclasses.replace(CONFIG, modules_to_save="tail")),
            "'tail' matches no",
        ),
        (
            lambda m, f: save_adapter(m, f, config=dataclasses.replace(CONFIG, modules_to_save=("head", "a"))),
            "'a' is converted and lies under modules_to_save",
        ),
    ],
)
def test_what_cannot_be_loaded_is_not_saved(folder, save, message):
    before = contents(folder)
    with pytest.raises(ValueError, match=message):
        save(converted(), folder)
    assert contents(folder) == before
    load_adapter(Net(), folder)
    with pytest.raises(ValueError, match=message):
        save(converted(), folder / "new" / "deeper")
    assert not (folder / "new" / "deeper").exists()


def test_masks_of_no_model_at_all_are_a_type_error(tmp_path):
    with pytest.raises(TypeError, match="must be a LayerMasks, got a list"):
        save_adapter(converted(), tmp_path / "x", masks=[[True, True]] * 2)
    assert not (tmp_path / "x").exists()


def test_a_layer_without_the_hash_of_its_weight_is_not_saved(folder):
    model, before = converted(), contents(folder)
    layer = MASMLinear.from_linear(nn.Linear(12, 12), CONFIG)
    parts = Decomposition(torch.zeros(12, 12), layer.u, layer.s, layer.v, layer.offsets, 0.0)
    model.a = MASMLinear(parts, layer.bias)
    with pytest.raises(ValueError, match="'a' does not know the weight it was made from"):
        save_adapter(model, folder)
    assert contents(folder) == before


@pytest.mark.parametrize("damage", ["truncate", "bend"])
def test_what_was_written_is_read_back_before_it_replaces(folder, monkeypatch, damage):
    """A disk that loses bytes, or a factor whose shape is wrong: the adapter that was there stays."""
    model, before = converted(), contents(folder)
    with torch.no_grad():
        model.a.s.add_(1)
    if damage == "bend":
        model.a.register_buffer("u0", torch.zeros(3, 12))
        message = r"layers\.a\.u0: expected shape \[4, 12\], the adapter holds \[3, 12\]"
    else:
        from masm_ext.adapter import files

        def lossy(path, data):
            return real(path, data[:-7] if path.suffix == ".safetensors" else data)

        real = files.staged
        monkeypatch.setattr(files, "staged", lossy)
        message = "truncated or was changed"
    with pytest.raises(ValueError, match=message):
        save_adapter(model, folder)
    assert contents(folder) == before
    with pytest.raises(ValueError, match=message):
        save_adapter(model, folder / "new")
    assert not (folder / "new").exists()


def test_masks_come_from_the_layers(tmp_path):
    model = converted()
    model.a.mask[1] = False
    save_adapter(model, tmp_path)
    fresh = Net()
    load_adapter(fresh, tmp_path)
    assert fresh.a.mask.tolist() == [True, False] and fresh.b.mask.tolist() == [True, True]
    masks = LayerMasks(model, CONFIG)
    save_adapter(model, tmp_path, masks=masks)
    fresh = Net()
    load_adapter(fresh, tmp_path)
    assert [fresh.a.mask.tolist(), fresh.b.mask.tolist()] == [model.a.mask.tolist(), model.b.mask.tolist()]


class Scaled(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


class Wrapping(torch.Tensor):
    """A tensor subclass as quantized weights are, in the least that makes one."""


def hooked(m):
    m.a.register_forward_hook(lambda *_: None)


def own_forward(m):
    m.a.forward = m.a.forward


def subclass(m):
    scaled = Scaled(12, 12)
    scaled.load_state_dict(m.a.state_dict())
    m.a = scaled


def tied(m):
    m.b.weight = m.a.weight


def tied_bias(m):
    m.norm.bias = m.a.bias


def fused(m):
    m.a = nn.MultiheadAttention(12, 2)


def parametrized(m):
    weight_norm(m.a)


def wrapped_layer(m):
    m.a = torch.compile(m.a, backend="eager")


def quantized(m):
    m.a.weight = nn.Parameter(m.a.weight.detach().as_subclass(Wrapping), requires_grad=False)


def float8(m):
    m.a.weight = nn.Parameter(m.a.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)


def on_meta(m):
    m.a.to("meta")


def frozen_on_meta(m):
    m.norm.to("meta")


REFUSALS = {
    hooked: (ValueError, "'a' has hooks"),
    own_forward: (ValueError, "'a' has a forward of its own"),
    subclass: (TypeError, "'a' is a Scaled, a subclass"),
    tied: (ValueError, "'a' shares its weight with 'b'"),
    tied_bias: (ValueError, "'a' shares its bias with 'norm'"),
    parametrized: (TypeError, "'a' is a ParametrizedLinear"),
    wrapped_layer: (ValueError, "'a' is wrapped on its own in a OptimizedModule"),
    quantized: (TypeError, r"a\.weight is a Wrapping \(torch.float32\), a tensor subclass.*plain tensors of float32"),
    float8: (TypeError, r"a\.weight has dtype float8_e4m3fn; supported are float32, float64, bfloat16, float16"),
    on_meta: (ValueError, "a: the weight is on the meta device|'a'.*meta"),
    frozen_on_meta: (ValueError, r"norm\.weight is on the meta device"),
}


def snapshot(model):
    """Everything that a failed call must not change, by identity and by value."""
    modules = [(name, id(m), type(m), m.training) for name, m in model.named_modules()]
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    flags = [(name, id(t), t.requires_grad, t._version) for name, t in tensors]
    return modules, flags, sorted(model.__dict__)


@pytest.mark.parametrize("change", REFUSALS, ids=lambda f: f.__name__)
def test_load_refuses_what_convert_refuses_and_both_leave_the_model_alone(change, folder):
    error, message = REFUSALS[change]
    model = Net()
    change(model)
    before = snapshot(model)
    with pytest.raises(error, match=message):
        convert(model, CONFIG, use_cache=False, progress=False)
    assert snapshot(model) == before
    with pytest.raises(AdapterError, match=message):
        load_adapter(model, folder)
    assert snapshot(model) == before


def test_layers_inside_fused_modules_are_refused_by_both(tmp_path):
    plain = nn.ModuleDict({"t": nn.ModuleDict({"linear1": nn.Linear(16, 32)})})
    config = MASMConfig(target_modules="linear1", num_subspaces=2, subspace_rank=2)
    save_adapter(converted(config, plain), tmp_path)
    model = nn.ModuleDict({"t": nn.TransformerEncoderLayer(16, 2, 32)})
    before = snapshot(model)
    with pytest.raises(AdapterError, match="inside TransformerEncoderLayer 't'"):
        load_adapter(model, tmp_path)
    assert snapshot(model) == before


def test_a_merged_layer_is_refused_by_its_type(folder):
    model = converted()
    merge(model)
    with pytest.raises(AdapterError, match="'a' is a MergedLinear"):
        load_adapter(model, folder)


def test_a_failure_while_the_layers_are_put_in_is_undone(folder):
    class Stubborn(Net):
        def __setattr__(self, name, value):
            if name == "b" and isinstance(value, MASMLinear):
                raise RuntimeError("not this one")
            super().__setattr__(name, value)

    model = Stubborn()
    model.norm.requires_grad_(False)
    before, head = snapshot(model), model.head.weight.detach().clone()
    for call in (lambda: load_adapter(model, folder), lambda: convert(model, CONFIG, use_cache=False, progress=False)):
        with pytest.raises(RuntimeError, match="not this one"):
            call()
        modules, flags, attributes = snapshot(model)
        assert (modules, attributes) == (before[0], before[2])
        assert [flag[:3] for flag in flags] == [flag[:3] for flag in before[1]]
        assert torch.equal(model.head.weight, head)


def test_an_integer_in_place_of_a_float_is_refused(folder):
    path = next(folder.glob("*.safetensors"))
    tensors = safetensors.torch.load(path.read_bytes())
    tensors["saved.head.weight"] = tensors["saved.head.weight"].int()
    path.write_bytes(data := safetensors.torch.save(tensors))
    record = json.loads((folder / "adapter.json").read_text())
    record["tensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "adapter.json").write_text(json.dumps({**record, "sha256": digest_of(record)}))
    with pytest.raises(AdapterError, match=r"saved\.head\.weight: expected a floating-point tensor.*int32"):
        load_adapter(Net(), folder)
