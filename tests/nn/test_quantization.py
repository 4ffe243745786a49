"""Frozen weights of 8 bits: outputs and gradients are those of their dense values, and nothing dense is kept."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masm_ext import (
    MaskedAdamW,
    MASMConfig,
    MASMLinear,
    convert,
    load_adapter,
    merge,
    param_groups,
    quantize,
    save_adapter,
)
from masm_ext.nn.quantized_linear import QuantizedLinear
from masm_ext.ops import quantized_linear, quantized_subspace_linear, subspace_linear
from masm_ext.quantization import _rounded

torchao = pytest.importorskip("torchao", reason="quantize needs torchao")

FORMATS = ("int8", "float8")
#: leading shape of x, N, D, K, rank of each
CASES = [
    ((5,), 24, 40, 2, 3),
    ((2, 7), 33, 17, 3, 1),
    ((0,), 16, 16, 1, 4),
    ((3, 0, 2), 9, 12, 1, 1),
    ((257,), 64, 48, 2, 8),
]


def layer_of(N: int, D: int, K: int, rank: int, dtype: torch.dtype) -> MASMLinear:
    layer = MASMLinear.from_linear(nn.Linear(D, N), MASMConfig(num_subspaces=K, subspace_rank=rank)).to(dtype)
    with torch.no_grad():  # as after some training
        for p in (layer.u, layer.s, layer.v):
            p.add_(0.1 * torch.randn_like(p))
    return layer


def model_of(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 40), nn.LayerNorm(40), nn.Linear(40, 4)).to(dtype)
    convert(
        *(model, MASMConfig(num_subspaces=2, subspace_rank=3, modules_to_save=["4"])),
        target_modules=["0"], use_cache=False, progress=False,
    )  # fmt: skip
    return model


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_outputs_and_gradients_are_those_of_the_dense_values(case, dtype, format):
    shape, N, D, K, rank = case
    layer = layer_of(N, D, K, rank, dtype)
    rounded = _rounded(layer.principal, format)
    dense = rounded.dequantize().to(dtype) if dtype == torch.float64 else rounded.dequantize(output_dtype=dtype)
    if K > 1:
        layer.mask[0] = False
    x = torch.randn(*shape, 2 * D, dtype=dtype)[..., ::2]  # not contiguous
    dy = torch.randn(*shape, N, dtype=dtype)
    results = []
    for function, weight in ((subspace_linear, dense), (quantized_subspace_linear, rounded)):
        leaves = [t.detach().clone().requires_grad_() for t in (x, layer.u, layer.s, layer.v, layer.bias)]
        y = function(leaves[0], weight, *leaves[1:4], leaves[4], offsets=layer.offsets, mask=layer.mask)
        results.append([y, *torch.autograd.grad(y, leaves, dy)])
    for expected, found in zip(*results):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_linear_layer(format, bias):
    linear = nn.Linear(13, 21, bias=bias)
    weight = _rounded(linear.weight.detach(), format)
    x = torch.randn(4, 5, 13, requires_grad=True)
    y = QuantizedLinear(linear, weight)(x)
    expected = F.linear(x, weight.dequantize(), linear.bias)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    leaves = [x, linear.bias] if bias else [x]
    for found, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy)):
        torch.testing.assert_close(found, wanted)
    one = torch.randn(13, requires_grad=True)
    QuantizedLinear(linear, weight)(one).sum().backward()
    torch.testing.assert_close(one.grad, weight.dequantize().sum(0))


def test_gradcheck():
    layer = layer_of(6, 5, 2, 1, torch.float64)
    rounded = _rounded(layer.principal, "int8")
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True)]
    leaves += [t.detach().clone().requires_grad_() for t in (layer.u, layer.s, layer.v, layer.bias)]
    assert torch.autograd.gradcheck(
        lambda x, u, s, v, b: quantized_subspace_linear(x, rounded, u, s, v, b, offsets=layer.offsets), leaves
    )
    x, bias = leaves[0], leaves[4]
    assert torch.autograd.gradcheck(lambda x, b: quantized_linear(x, rounded, b), [x, bias])


def test_nothing_dense_is_kept_for_the_backward_pass(seed):
    model = model_of(seed)
    quantize(model)
    kept = []

    def pack(t):
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(torch.randn(3, 40)).sum().backward()
    own = {p.data_ptr() for p in model.parameters()}
    dense = [t for t in kept if type(t) is torch.Tensor and t.shape in ((48, 40), (40, 48)) and t.data_ptr() not in own]
    quantised = [t for t in kept if type(t).__name__ == "Int8Tensor"]
    assert not dense and len(quantised) == 2


@pytest.mark.parametrize("format", FORMATS)
def test_the_report(seed, format):
    model = model_of(seed, torch.bfloat16)
    with torch.no_grad():
        model[0].s.mul_(1.5)
    weights = {"0": model[0].principal.clone(), "2": model[2].weight.detach().clone()}
    learned = model[0].relative_update()
    report = quantize(model, format)
    assert [w.name for w in report.weights] == ["0", "2"] and report.format == format  # not the head, which learns
    for row in report.weights:
        layer = model.get_submodule(row.name)
        weight = weights[row.name].double()
        error = (layer.weight.dequantize(output_dtype=torch.float32).double() - weight).norm() / weight.norm()
        assert row.error == pytest.approx(float(error), rel=1e-6) and row.shape == tuple(weight.shape)
        assert 1e-4 < row.error < {"int8": 0.01, "float8": 0.04}[format]
    assert report.weights[0].learned == pytest.approx(learned) and report.weights[1].learned is None
    assert report.bytes_before == 2 * 2 * 40 * 48
    # 1 byte an element, a scale of 4 and a zero point of 1 byte a row; on wide layers that is little
    assert report.bytes_after <= (40 * 48 * 2 + (40 + 48) * 5)
    assert "rounding" in str(report) and format in str(report)


def test_memory_of_wide_weights_is_at_most_055_of_bfloat16():
    model = nn.Sequential(nn.Linear(256, 512), nn.Linear(512, 256)).bfloat16().requires_grad_(False)
    report = quantize(model)
    assert report.bytes_after <= 0.55 * report.bytes_before


@pytest.mark.parametrize("format", FORMATS)
def test_training_changes_what_learns_and_the_adapter_belongs_to_the_exact_base(seed, tmp_path, format):
    model = model_of(seed)
    exact = copy.deepcopy(model)
    quantize(model, format)
    frozen = {n: model.get_submodule(n).weight.dequantize().clone() for n in ("0", "2")}
    optimizer = MaskedAdamW(param_groups(model, lr=1e-2), orthogonality=0.01)
    for _ in range(3):
        model(torch.randn(6, 40)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(model.get_submodule(n).weight.dequantize(), w) for n, w in frozen.items())
    assert not torch.equal(model[0].u, exact[0].u)
    save_adapter(model, tmp_path)
    plain = nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 40), nn.LayerNorm(40), nn.Linear(40, 4))
    torch.manual_seed(seed)  # as model_of
    for own, other in zip(
        plain, nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 40), nn.LayerNorm(40), nn.Linear(40, 4))
    ):
        own.load_state_dict(other.state_dict())
    load_adapter(plain, tmp_path)
    quantize(plain, format)
    x = torch.randn(5, 40)
    for name in "usv":
        assert torch.equal(getattr(plain[0], name), getattr(model[0], name))
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-6)
    merged = copy.deepcopy(model)
    assert merge(merged, keep=False) == 1
    torch.testing.assert_close(merged(x), model(x), rtol=1e-4, atol=1e-5)


def test_other_ways_to_run(seed):
    model = model_of(seed)
    quantize(model)
    x = torch.randn(4, 40)
    y = model(x)
    torch.testing.assert_close(copy.deepcopy(model)(x), y, rtol=0, atol=0)
    with torch.inference_mode():
        torch.testing.assert_close(model(x), y, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model[0](x).dtype == torch.bfloat16 and model[2](torch.randn(2, 48)).dtype == torch.bfloat16
    half = copy.deepcopy(model).to(torch.bfloat16)
    assert half[0].u.dtype == torch.float32 and half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), y)


def test_what_cannot_be_quantised(seed):
    model = model_of(seed)
    with pytest.raises(ValueError, match="one of int8, float8, got 'int4'"):
        quantize(model, "int4")
    quantize(model)
    with pytest.raises(ValueError, match="quantised weights already"):
        quantize(model)
    with pytest.raises(ValueError, match=r"no MASMLinear and no frozen nn\.Linear"):
        quantize(nn.Sequential(nn.Linear(3, 3)))
    broken = model_of(seed)
    with torch.no_grad():
        broken[2].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"2\.weight is on the meta device or not finite"):
        quantize(broken)
    assert type(broken[2]) is nn.Linear and type(broken[0].principal) is torch.Tensor  # nothing was changed
    layers = [layer_of(8, 8, 1, 1, torch.float32) for _ in range(2)]
    for layer in layers:
        layer.principal, layer.quantized = _rounded(layer.principal, "int8"), True
    with pytest.raises(ValueError, match="run one by one"):
        MASMLinear.group(layers, nn.Module())


def test_shared_weights_stay(seed):
    torch.manual_seed(seed)
    embedding, head, other = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False), nn.Linear(8, 8)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, other, head).requires_grad_(False)
    report = quantize(model)
    assert [w.name for w in report.weights] == ["1"] and head.weight is embedding.weight
