import copy

import pytest
import torch
from tolerances import GRADIENT, relative_error
from torch import nn

from masm_ext import MASMConfig, MASMLinear, reference

CONFIGS = [
    MASMConfig(num_subspaces=1, subspace_rank=1),
    MASMConfig(num_subspaces=2, subspace_rank=3, partition="contiguous"),
    MASMConfig(num_subspaces=3, subspace_rank=[5, 1, 3]),
    MASMConfig(num_subspaces=5, subspace_rank=[1, 2, 3, 2, 1]),
    MASMConfig(num_subspaces=3, energy=0.1),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"K{c.num_subspaces}-{c.subspace_rank}-{c.energy}")
@pytest.mark.parametrize("shape", [(33, 20), (24, 24), (17, 50)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_linear_it_came_from(config, shape, bias):
    linear = nn.Linear(shape[1], shape[0], bias=bias)
    layer = MASMLinear.from_linear(linear, config)
    x = torch.randn(4, 9, shape[1])
    assert relative_error(layer(x), linear(x)) <= 1e-6
    R = layer.offsets[-1]
    assert layer.u.shape == (R, shape[0]) and layer.v.shape == (R, shape[1]) and layer.s.shape == (R,)
    assert len(layer.ranks) == config.num_subspaces and sum(layer.ranks) == R
    trainable = {n for n, p in layer.named_parameters() if p.requires_grad}
    assert trainable == {"u", "s", "v"}
    # the artifact directions are the last R ones
    sigma = torch.linalg.svdvals(linear.weight.double())
    assert relative_error(layer.s.double().sort().values, sigma[-R:].sort().values) <= 1e-5
    assert layer.relative_update() < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_reconstruction_is_no_worse_than_one_rounding(dtype):
    linear = nn.Linear(40, 30).to(dtype)
    layer = MASMLinear.from_linear(linear, MASMConfig(subspace_rank=3))
    assert layer.u.dtype == torch.float32
    exact = layer.weight.double() + (layer.u.double().mT * layer.s.double()) @ layer.v.double()
    error = (exact - linear.weight.double()).abs()
    info = torch.finfo(dtype)  # below smallest_normal the spacing is constant
    half_ulp = info.eps / 2 * 2.0 ** layer.weight.double().abs().clamp_min(info.smallest_normal).log2().floor()
    assert (error <= half_ulp * 1.001).all()
    x = torch.randn(5, 40, dtype=dtype)
    assert relative_error(layer(x), linear(x)) <= {torch.float32: 1e-6}.get(dtype, 1e-2)
    assert layer(x).dtype == dtype


def test_gradients_match_float64_autograd_of_the_reference():
    linear = nn.Linear(50, 34)
    layer = MASMLinear.from_linear(linear, MASMConfig(num_subspaces=3, subspace_rank=[5, 2, 4]))
    x = torch.randn(3, 77, 50, requires_grad=True)
    layer(x).square().sum().backward()
    leaves = {n: getattr(layer, n).detach().double().requires_grad_() for n in ("u", "s", "v")}
    xd = x.detach().double().requires_grad_()
    y, _ = reference.subspace_linear(xd, layer.weight.double(), bias=layer.bias.detach().double(), **leaves)
    y.square().sum().backward()
    assert relative_error(x.grad, xd.grad) <= GRADIENT[torch.float32]
    for name, leaf in leaves.items():
        assert relative_error(getattr(layer, name).grad, leaf.grad) <= GRADIENT[torch.float32], name


def test_to_dtype_deepcopy_and_state_dict():
    layer = MASMLinear.from_linear(nn.Linear(20, 12), MASMConfig(subspace_rank=2))
    x = torch.randn(6, 20)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.u is not layer.u
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.mask.dtype == torch.bool and half(x.bfloat16()).dtype == torch.bfloat16
    other = MASMLinear.from_linear(nn.Linear(20, 12), MASMConfig(subspace_rank=2))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


def test_relative_update_is_that_of_the_dense_weight():
    linear = nn.Linear(20, 12)
    layer = MASMLinear.from_linear(linear, MASMConfig(subspace_rank=2))
    with torch.no_grad():
        layer.s.mul_(3)
        layer.u.add_(0.1 * torch.randn_like(layer.u))
    change = (layer.folded_weight() - linear.weight).norm() / linear.weight.norm()
    assert layer.relative_update() == pytest.approx(change.item(), rel=1e-4)


def test_compile_fullgraph_and_export():
    layer = MASMLinear.from_linear(nn.Linear(20, 12), MASMConfig(subspace_rank=2))
    model = nn.Sequential(layer, nn.GELU(), nn.Linear(12, 2))
    x = torch.randn(7, 20)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    want = model(x)
    assert relative_error(compiled(x), want) <= 1e-6
    compiled(x).sum().backward()
    got = layer.u.grad.clone()
    layer.u.grad = None
    model(x).sum().backward()
    assert relative_error(got, layer.u.grad) <= 1e-6
    layer.mask.zero_()  # a mask that changes needs no recompilation
    layer.u.grad = None
    compiled(x).sum().backward()
    assert layer.u.grad.abs().max() == 0
    exported = torch.export.export(model, (x,)).module()
    assert relative_error(exported(x), want) <= 1e-6


def test_extra_repr_tells_the_shape():
    text = repr(MASMLinear.from_linear(nn.Linear(20, 12), MASMConfig(num_subspaces=2, subspace_rank=[3, 1])))
    for part in ("in_features=20", "out_features=12", "ranks=[3, 1]", "bias=True"):
        assert part in text


@pytest.mark.parametrize(
    ("make", "config", "error", "message"),
    [
        (lambda: nn.Linear(8, 6), dict(num_subspaces=3, subspace_rank=3), ValueError, r"need 9 .* q = min\(N, D\) = 6"),
        (lambda: nn.Conv1d(8, 6, 1), {}, TypeError, "expected an nn.Linear, got Conv1d"),
        (lambda: nn.Linear(8, 6, device="meta"), dict(subspace_rank=1), ValueError, "meta device"),
    ],
)
def test_bad_layers(make, config, error, message):
    with pytest.raises(error, match=message):
        MASMLinear.from_linear(make(), MASMConfig(**config))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weight(bad):
    linear = nn.Linear(8, 6)
    with torch.no_grad():
        linear.weight[2, 3] = bad
    with pytest.raises(ValueError, match="query: weight has 1 NaN or infinite"):
        MASMLinear.from_linear(linear, MASMConfig(subspace_rank=1), name="query")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(subspace_rank=0), "subspace_rank must be at least 1"),
        (dict(num_subspaces=0), "num_subspaces"),
        (dict(num_subspaces=3, subspace_rank=[1, 2]), "one rank for each of the 3"),
        (dict(energy=1.5), "energy"),
        (dict(partition="random"), "partition"),
        (dict(mask_policy="best"), "mask_policy"),
        (dict(mask_active_fraction=0), "mask_active_fraction"),
        (dict(orthogonality=-1), "orthogonality"),
        (dict(mask_interval=0), "mask_interval"),
    ],
)
def test_config_is_checked(fields, message):
    with pytest.raises(ValueError, match=message):
        MASMConfig(**fields)


def test_config_round_trip():
    config = MASMConfig(target_modules=["q", "v"], num_subspaces=2, subspace_rank=[3, 1], mask_threshold=0.2)
    assert MASMConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match="new_field"):
        MASMConfig.from_dict({**config.to_dict(), "new_field": 1})
