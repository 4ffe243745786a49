import copy
import hashlib
import json
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from masm_ext import LayerMasks, MASMConfig, convert, load_adapter, save_adapter
from masm_ext.adapter.files import FORMAT_VERSION, AdapterError, digest_of, read_record

CONFIG = MASMConfig(
    target_modules=["0", "2"], modules_to_save="4", num_subspaces=2, subspace_rank=[3, 2], train_bias=True
)


def base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 30), nn.BatchNorm1d(30), nn.Linear(30, 2))


@pytest.fixture
def saved(tmp_path):
    """(pretrained model, adapted model, adapter folder)"""
    pretrained = base()
    model = copy.deepcopy(pretrained)
    convert(model, CONFIG, use_cache=False, progress=False)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    masks = LayerMasks(model, CONFIG)
    masks.load_state_dict({**masks.state_dict(), "selected": torch.tensor([[1.0, 0.0], [0.0, 1.0]])})
    save_adapter(model, tmp_path / "adapter", masks=masks)
    return pretrained, model, tmp_path / "adapter"


def test_round_trip_without_svd(saved, monkeypatch):
    pretrained, model, folder = saved
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("an SVD on load"))
    fresh = copy.deepcopy(pretrained)
    report = load_adapter(fresh, folder)
    x = torch.randn(5, 20)
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    state = model.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in fresh.state_dict().items())
    assert [p.requires_grad for p in fresh.parameters()] == [p.requires_grad for p in model.parameters()]
    assert len(report.layers) == 2 and fresh[0].mask.tolist() == [True, False]
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]
    assert read_record(folder)["layers"]["0"]["base_sha256"] == model[0].base_hash


def test_half_precision_base(tmp_path):
    pretrained = base().to(torch.bfloat16)
    model = copy.deepcopy(pretrained)
    convert(model, CONFIG, use_cache=False, progress=False)
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(pretrained)
    load_adapter(fresh, tmp_path)
    x = torch.randn(5, 20).bfloat16()
    assert torch.equal(fresh.eval()(x), model.eval()(x))
    with pytest.raises(
        AdapterError, match=r"0\.weight is float32, the adapter's base was bfloat16; load the base in it"
    ):
        load_adapter(pretrained.float(), tmp_path)


def test_another_base_is_refused_and_left_alone(saved):
    _, _, folder = saved
    other = base()
    with pytest.raises(AdapterError, match=r"differ from those the adapter was trained on \(0\.weight, 2\.weight\)"):
        load_adapter(other, folder)
    assert type(other[0]) is nn.Linear and other[0].weight.requires_grad
    with pytest.raises(AdapterError, match="'2', where this model has nothing"):
        load_adapter(nn.Sequential(copy.deepcopy(saved[0][0])), folder)


def test_converted_model_is_refused(saved):
    with pytest.raises(AdapterError, match="before conversion"):
        load_adapter(saved[1], saved[2])


def contents(folder):
    """Name and bytes of every file, hidden ones too."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_file(folder):
    return next(folder.glob("*.safetensors"))


def edit(folder, change, seal=True):
    """Change the record; ``seal`` writes a digest that fits, as a newer or another program would."""
    path = folder / "adapter.json"
    record = json.loads(path.read_text())
    change(record)
    if seal:
        record["sha256"] = digest_of(record)
    path.write_text(json.dumps(record))


def test_truncated_and_tampered_files(saved):
    pretrained, _, folder = saved
    path = tensors_file(folder)
    whole = path.read_bytes()
    for data in (whole[:-10], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(data)
        with pytest.raises(AdapterError, match="truncated or was changed"):
            load_adapter(copy.deepcopy(pretrained), folder)
    path.unlink()
    with pytest.raises(AdapterError, match="incomplete"):
        load_adapter(copy.deepcopy(pretrained), folder)


def test_damaged_json_newer_version_missing_folder(saved, tmp_path):
    pretrained, _, folder = saved
    edit(folder, lambda r: r.update(format_version=FORMAT_VERSION + 1))
    with pytest.raises(AdapterError, match="upgrade masm_ext"):
        load_adapter(pretrained, folder)
    edit(folder, lambda r: (r.update(format_version=FORMAT_VERSION), r.pop("layers")))
    with pytest.raises(AdapterError, match=r"KeyError.*layers"):
        load_adapter(pretrained, folder)
    (folder / "adapter.json").write_text('{"format_ver')
    with pytest.raises(AdapterError, match="damaged"):
        load_adapter(pretrained, folder)
    with pytest.raises(FileNotFoundError, match=r"adapter\.json is missing"):
        load_adapter(pretrained, tmp_path / "nowhere")


def test_strict_keys_and_shapes(saved):
    pretrained, _, folder = saved

    def rewrite(change):
        path = tensors_file(folder)
        tensors = safetensors.torch.load(path.read_bytes())
        change(tensors)
        data = safetensors.torch.save(tensors)
        path.write_bytes(data)
        edit(folder, lambda r: r["tensors"].update(sha256=hashlib.sha256(data).hexdigest()))

    rewrite(lambda t: t.update(extra=torch.zeros(1)))
    with pytest.raises(AdapterError, match=r"1 unexpected \['extra'\]"):
        load_adapter(copy.deepcopy(pretrained), folder)
    rewrite(lambda t: (t.pop("extra"), t.pop("layers.0.u")))
    with pytest.raises(AdapterError, match=r"1 missing \['layers\.0\.u'\]"):
        load_adapter(copy.deepcopy(pretrained), folder)
    rewrite(lambda t: t.update({"layers.0.u": torch.zeros(2, 2)}))
    with pytest.raises(AdapterError, match=r"0\.u: expected shape \[5, 30\], the adapter holds \[2, 2\]"):
        load_adapter(copy.deepcopy(pretrained), folder)


def test_a_path_outside_the_folder_is_refused(saved):
    edit(saved[2], lambda r: r["tensors"].update(file="../x.safetensors"))
    with pytest.raises(AdapterError, match="outside its folder"):
        load_adapter(saved[0], saved[2])


def test_saving_again_replaces_and_a_crash_keeps_the_old_one(saved, monkeypatch):
    pretrained, model, folder = saved
    old = read_record(folder)
    with torch.no_grad():
        model[0].s.add_(1)
    before, real = contents(folder), os.replace

    def crash_at_json(source, target):
        if target.suffix == ".json":
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(os, "replace", crash_at_json)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(model, folder)
    assert contents(folder) == before
    load_adapter(copy.deepcopy(pretrained), folder)  # the old adapter is whole
    monkeypatch.undo()
    save_adapter(model, folder)
    assert len(list(folder.glob("*.safetensors"))) == 1 and read_record(folder) != old


def test_unconverted_or_merged_model_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no MASMLinear"):
        save_adapter(base(), tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.update(format_version="1"),
        lambda r: r.update(format_version=0),
        lambda r: r.update(format_version=True),
        lambda r: r.update(format="peft"),
        lambda r: r.update(tensors={}),
        lambda r: r.update(layers=[1]),
        lambda r: r.update(masks=[[1, 0]]),
        lambda r: r["layers"]["0"].update(offsets=[0, 9, 1]),
        lambda r: r["layers"]["0"].update(offsets=[0, 2.5, 5]),
        lambda r: r["layers"]["0"].update(offsets=[0, 0, 5]),
        lambda r: r["layers"]["0"].pop("base_sha256"),
        lambda r: r["layers"]["0"].update(base_sha256="00"),
        lambda r: r["layers"]["0"].update(energy="much"),
        lambda r: r["layers"]["0"].update(dtype="float17"),
        lambda r: r["layers"]["0"].update(shape=[30]),
        lambda r: r["layers"]["0"].pop("bias"),
        lambda r: r.update(layers={}, masks=[]),
        lambda r: r["base"]["3.weight"].pop("sha256"),
        lambda r: r.update(base=None),
        lambda r: r.update(saved_modules=[4]),
        lambda r: r["masks"][0].__setitem__(0, "on"),
        lambda r: r["tensors"].update(file=None),
        lambda r: r["config"].update(unknown_field=1),
        lambda r: r["config"].update(num_subspaces=1, subspace_rank=2),
    ],
)
def test_every_odd_record_is_an_adapter_error_and_the_model_is_left_alone(saved, change):
    pretrained, _, folder = saved
    edit(folder, change)
    with pytest.raises(AdapterError, match=r"adapter\.json"):
        load_adapter(pretrained, folder)
    assert type(pretrained[0]) is nn.Linear and pretrained[0].weight.requires_grad


def test_a_changed_record_is_noticed(saved):
    edit(saved[2], lambda r: r["masks"][0].reverse(), seal=False)
    with pytest.raises(AdapterError, match="not what was written"):
        load_adapter(saved[0], saved[2])


def test_concurrent_writers_leave_one_whole_adapter(saved):
    import concurrent.futures

    pretrained, model, folder = saved
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for future in [pool.submit(save_adapter, model, folder) for _ in range(24)]:
            future.result()
    load_adapter(pretrained, folder)
    assert sorted(p.suffix for p in folder.iterdir()) == [".json", ".safetensors"]


def test_the_hash_travels_with_the_weights(saved):
    _, model, _ = saved
    other = base()
    convert(other, CONFIG, use_cache=False, progress=False)
    assert other[0].base_hash != model[0].base_hash
    other.load_state_dict(model.state_dict())
    assert other[0].base_hash == model[0].base_hash
