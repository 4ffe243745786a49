"""Artifact directions from the gradient of the weights."""

import copy

import pytest
import torch
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, load_adapter, save_adapter, select_layers, weight_gradients
from masm_ext.adapter.files import AdapterError
from masm_ext.registry import PARTITIONS

CONFIG = MASMConfig(
    target_modules=["0", "2"],
    modules_to_save="4",
    num_subspaces=2,
    subspace_rank=[3, 2],
    directions="gradient",
    lift=0.5,
    orthogonality=0.0,
    spectral_consistency=0.0,
    mask_policy="none",
)


def base() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 30), nn.GELU(), nn.Linear(30, 2))


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(8, 20), torch.randint(0, 2, (8,))) for _ in range(count)]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("shape", [(12, 20), (17, 9)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_parts_sum_to_the_weight_along_the_leading_directions(shape, partition, dtype):
    linear = nn.Linear(shape[1], shape[0], dtype=dtype)
    gradient = torch.randn(shape)
    config = MASMConfig(subspace_rank=[2, 3, 1], directions="gradient", lift=0.7, partition=partition)
    layer = MASMLinear.from_linear(linear, config, gradient=gradient)
    weight = linear.weight.detach().double()
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-7, torch.bfloat16: 4e-3}[dtype]  # one rounding of W
    total = layer.principal.double() + (layer.u.double().mT * layer.s.double()) @ layer.v.double()
    assert (total - weight).norm() <= tolerance * weight.norm()
    gamma = torch.linalg.svdvals(gradient.double())
    # u^T G v is -gamma of each direction: a larger s lowers the loss
    of_rows = ((layer.u.double() @ gradient.double()) * layer.v.double()).sum(1)
    expected = -gamma[[-1 - i for i in layer.directions]]
    torch.testing.assert_close(of_rows, expected, rtol=1e-5, atol=1e-5, check_dtype=False)
    assert sorted(layer.directions) == [-6, -5, -4, -3, -2, -1]
    rms = weight.norm() / min(shape) ** 0.5
    torch.testing.assert_close(layer.s.double(), (0.7 * rms).expand(6), rtol=1e-6, atol=0)
    assert layer.base_norm() == pytest.approx(float(weight.norm()), rel=max(tolerance, 1e-6))
    assert 0 < layer.energy < 1 and layer.relative_update() < 1e-7  # the root of a difference that is 0


def test_the_mean_gradient_of_the_batches():
    model, data = base(), batches()
    model.train()[0].weight.grad = torch.ones(30, 20)
    got = weight_gradients(model, CONFIG, data, loss)
    assert model.training and torch.equal(model[0].weight.grad, torch.ones(30, 20))
    assert all(p.requires_grad for p in model.parameters())
    model.zero_grad()
    for batch in data:
        (loss(model, batch) / len(data)).backward()
    assert set(got) == {"0", "2"}
    for name in got:
        torch.testing.assert_close(got[name], model[int(name)].weight.grad)
    left = iter(data)
    first = weight_gradients(model, MASMConfig(target_modules="2", direction_batches=1), left, loss)
    assert set(first) == {"2"} and len(list(left)) == len(data) - 1


def test_a_model_is_converted_trained_and_saved(tmp_path):
    model, data = base(), batches()
    pretrained, x = copy.deepcopy(model), data[0][0]
    report = convert(model, CONFIG, gradients=weight_gradients(model, CONFIG, data, loss), progress=False)
    assert len(report.layers) == 2
    torch.testing.assert_close(model(x), pretrained(x), rtol=1e-5, atol=1e-5)
    before = float(sum(loss(model, batch) for batch in data))
    optimizer = torch.optim.SGD([p for m in (model[0], model[2]) for p in (m.u, m.s, m.v)], lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        sum(loss(model, batch) for batch in data).backward()
        optimizer.step()
    assert float(sum(loss(model, batch) for batch in data)) < before
    save_adapter(model, tmp_path)
    fresh = copy.deepcopy(pretrained)
    load_adapter(fresh, tmp_path)
    assert torch.equal(fresh(x), model(x)) and fresh[0].directions == model[0].directions
    # the state of another conversion is known by its directions
    other = copy.deepcopy(pretrained)
    trailing = MASMConfig(target_modules=["0", "2"], subspace_rank=[3, 2], num_subspaces=2, lift=0.5)
    convert(other, trailing, progress=False)
    other.load_state_dict(model.state_dict())
    with pytest.raises((ValueError, AdapterError), match="other singular directions"):
        save_adapter(other, tmp_path / "other")


def test_wrong_use_is_refused():
    model, data = base(), batches(1)
    gradients = weight_gradients(model, CONFIG, data, loss)
    with pytest.raises(ValueError, match=r"needs gradients=weight_gradients\(.*got none"):
        convert(model, CONFIG, progress=False)
    del gradients["2"]
    with pytest.raises(ValueError, match=r"those of 1 layers, without '2'"):
        convert(model, CONFIG, gradients=gradients, progress=False)
    with pytest.raises(ValueError, match="used with directions='gradient' only"):
        convert(model, MASMConfig(target_modules="0"), gradients=gradients, progress=False)
    with pytest.raises(ValueError, match="0: need a finite gradient of the shape"):
        convert(model, MASMConfig(target_modules="0", directions="gradient", lift=1.0), progress=False,
                gradients={"0": torch.zeros(3, 3)})  # fmt: skip
    with pytest.raises(ValueError, match="the gradient has rank 1, and 2 directions are wanted"):
        MASMLinear.from_linear(
            model[4], MASMConfig(subspace_rank=2, num_subspaces=1, directions="gradient", lift=1.0),
            gradient=torch.outer(torch.randn(2), torch.randn(30)),
        )  # fmt: skip
    with pytest.raises(ValueError, match="2 elements that are not finite"):
        MASMLinear.from_linear(
            model[4], MASMConfig(subspace_rank=1, num_subspaces=1, directions="gradient", lift=1.0),
            gradient=torch.tensor([[float("nan")] * 2 + [1.0] * 28, [1.0] * 30]),
        )  # fmt: skip
    for kwargs in ({"gradient": torch.ones(2, 30)}, {"config": CONFIG}):
        with pytest.raises(ValueError, match="directions 'gradient' need a gradient, and only they"):
            MASMLinear.from_linear(model[4], kwargs.get("config", MASMConfig()), gradient=kwargs.get("gradient"))
    for wrong in ({"lift": 0.0}, {"lift": 1.0, "energy": 0.1}):
        with pytest.raises(ValueError, match="needs a lift above 0"):
            MASMConfig(directions="gradient", **wrong)
    with pytest.raises(ValueError, match="at least one batch, got none"):
        weight_gradients(model, CONFIG, [], loss)
    with torch.no_grad():
        model[4].weight.zero_()
    with pytest.raises(ValueError, match=r"has norm 0\.0 .* is the head fitted"):
        weight_gradients(model, CONFIG, data, loss)
    with pytest.raises(ValueError, match="at least two batches"):
        select_layers(model, CONFIG, data, loss)
