import copy

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, merge, unmerge


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 30), nn.GELU(), nn.Linear(30, 2))


CONFIG = MASMConfig(target_modules=["0", "2"], modules_to_save="4", num_subspaces=2, subspace_rank=3)


def converted(tmp_path=None, config=CONFIG):
    model = mlp()
    convert(model, config, use_cache=False, progress=False)
    return model


def perturb(model):
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))


def test_report_and_what_is_trainable(tmp_path):
    model = mlp()
    want = copy.deepcopy(model)
    report = convert(model, CONFIG, cache_dir=tmp_path, progress=False)
    x = torch.randn(5, 20)
    assert relative_error(model(x), want(x)) <= 1e-6
    assert [r.name for r in report.layers] == ["0", "2"] and report.layers[0].shape == (30, 20)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{i}.{n}" for i in (0, 2) for n in "usv"} | {"4.weight", "4.bias"}
    assert report.trainable_parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    text = str(report)
    assert "30 x 20" in text and "3+3" in text and "2 layers converted" in text
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("q", ["a.q", "b.q"]),
        (["a.q", "b.k"], ["a.q", "b.k"]),
        ("a.*", ["a.q", "a.k"]),
        (r"re:.*\.(q|k)", ["a.q", "a.k", "b.q", "b.k"]),
        (lambda name, module: module.in_features == 7, ["b.q", "b.k"]),
    ],
    ids=["name", "names", "glob", "regular expression", "function"],
)
def test_patterns(target, names):
    def pair(n):
        return nn.ModuleDict({"q": nn.Linear(n, 6), "k": nn.Linear(n, 6)})

    model = nn.ModuleDict({"a": pair(5), "b": pair(7)})
    convert(model, MASMConfig(subspace_rank=1), target_modules=target, use_cache=False, progress=False)
    assert [n for n, m in model.named_modules() if isinstance(m, MASMLinear)] == names


def test_exclude_and_train_bias():
    model = converted(
        config=MASMConfig(target_modules="*", exclude_modules=["2", "4"], subspace_rank=2, train_bias=True)
    )
    assert isinstance(model[0], MASMLinear) and type(model[2]) is nn.Linear
    assert model[0].bias.requires_grad and not model[2].weight.requires_grad


@pytest.mark.parametrize(
    ("config", "error", "message"),
    [
        (MASMConfig(target_modules="nothing"), ValueError, r"match no nn.Linear. The model has 3, for example 0, 2, 4"),
        (MASMConfig(), ValueError, "match no nn.Linear"),
        (MASMConfig(target_modules="0", subspace_rank=10), ValueError, r"0: 3 subspaces .* q = min\(N, D\) = 20"),
        (
            MASMConfig(target_modules="0", subspace_rank=1, modules_to_save="head"),
            ValueError,
            "'head' matches no module",
        ),
    ],
)
def test_bad_configs_leave_the_model_alone(config, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        convert(model, config, use_cache=False, progress=False)
    assert not any(isinstance(m, MASMLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_converting_twice_is_refused():
    with pytest.raises(ValueError, match="converted already"):
        convert(converted(), CONFIG, use_cache=False)


def test_non_finite_weights_are_named_before_anything_changes():
    model = mlp()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="2: weight has 1 NaN"):
        convert(model, CONFIG, use_cache=False, progress=False)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("target", ["linear1", "out_proj"])
def test_layers_whose_forward_is_bypassed_are_refused(target):
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    with pytest.raises(TypeError, match="without calling forward"):
        convert(model, MASMConfig(target_modules=target, subspace_rank=1), use_cache=False)


def test_merge_and_unmerge_round_trip():
    model = converted()
    perturb(model)
    x = torch.randn(6, 20)
    want = model(x)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    assert merge(model) == 2
    assert isinstance(model[0], nn.Linear) and set(model.state_dict()) == set(mlp().state_dict())
    assert relative_error(model(x), want) <= 1e-5
    with pytest.raises(ValueError, match="merged already"):
        merge(model)
    assert unmerge(model) == 2
    assert torch.equal(model(x), want)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="no merged layer"):
        unmerge(model)
    merge(model, keep=False)
    assert type(model[0]) is nn.Linear
    with pytest.raises(ValueError, match="keep=False"):
        unmerge(model)


def test_merged_model_loads_into_the_original_class():
    model = converted()
    perturb(model)
    x = torch.randn(3, 20)
    want = model(x)
    merge(model)
    plain = mlp()
    plain.load_state_dict(model.state_dict())
    assert relative_error(plain(x), want) <= 1e-5


def test_unmerge_follows_the_dtype_and_mode():
    model = converted().eval()
    merge(model)
    model.to(torch.float64)
    unmerge(model)
    assert model[0].weight.dtype == torch.float64 and not model[0].training
    assert model(torch.randn(2, 20, dtype=torch.float64)).dtype == torch.float64


def test_compile_fullgraph_over_a_converted_model():
    model = converted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 20)
    assert relative_error(compiled(x), model(x)) <= 1e-6


def test_activation_checkpointing():
    from torch.utils.checkpoint import checkpoint

    model = converted()
    x = torch.randn(5, 20, requires_grad=True)
    checkpoint(model, x, use_reentrant=False).sum().backward()
    got = model[0].u.grad.clone()
    model.zero_grad()
    model(x).sum().backward()
    assert torch.equal(got, model[0].u.grad)


def test_a_module_with_two_names_is_converted_under_both():
    shared = nn.Linear(10, 10)
    model = nn.Sequential(shared, nn.GELU(), shared)
    x = torch.randn(3, 10)
    want = model(x)
    convert(model, MASMConfig(target_modules="*", subspace_rank=1), use_cache=False, progress=False)
    assert model[0] is model[2] and isinstance(model[0], MASMLinear)
    assert relative_error(model(x), want) <= 1e-6
    merge(model)
    assert model[0] is model[2] and type(model[0]) is not MASMLinear
    unmerge(model)
    assert model[0] is model[2] and isinstance(model[0], MASMLinear)


def test_tied_weights_hooks_and_a_bare_linear_are_refused_before_anything_changes():
    tied = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
    tied[1].weight = tied[0].weight
    hooked = nn.Sequential(nn.Linear(10, 10))
    hooked[0].register_forward_hook(lambda *_: None)
    for model, message in ((tied, "shares its weight with '1'"), (hooked, "has hooks"), (nn.Linear(10, 10), "itself")):
        with pytest.raises(ValueError, match=message):
            convert(model, MASMConfig(target_modules="re:.*", subspace_rank=1), use_cache=False, progress=False)
        assert all(p.requires_grad for p in model.parameters()) and not hasattr(model, "masm_config")


def test_saved_modules_are_never_converted():
    model = converted(config=MASMConfig(target_modules="*", modules_to_save="4", subspace_rank=2))
    assert type(model[4]) is nn.Linear and model[4].bias.requires_grad and isinstance(model[2], MASMLinear)


def test_factors_stay_float32_when_the_model_becomes_half_precision():
    model = converted()
    x = torch.randn(4, 20)
    want = model(x)
    model.to(torch.bfloat16)
    assert model[0].weight.dtype == torch.bfloat16 and model[0].u.dtype == model[0].s0.dtype == torch.float32
    assert relative_error(model(x.bfloat16()), want) <= 3e-2
    merge(model)
    unmerge(model)
    assert model[0].u.dtype == torch.float32
    assert converted().half()[2].v.dtype == torch.float32 and converted().double()[2].v.dtype == torch.float64
