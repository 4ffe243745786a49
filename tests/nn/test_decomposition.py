import copy
import json

import pytest
import torch
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, load_adapter, save_adapter
from masm_ext.adapter.files import AdapterError, digest_of
from masm_ext.base_model import record_base
from masm_ext.decomposition import choose_ranks, trailing
from masm_ext.registry import DIRECTIONS, PARTITIONS


def test_interleaved_deals_round_robin_and_skips_full_subspaces():
    assert PARTITIONS["interleaved"]((2, 2, 2)) == [[0, 3], [1, 4], [2, 5]]
    assert PARTITIONS["interleaved"]((1, 3, 2)) == [[0], [1, 3, 5], [2, 4]]
    assert PARTITIONS["contiguous"]((1, 3, 2)) == [[0], [1, 2, 3], [4, 5]]


def test_energy_chooses_the_smallest_rank_that_holds_the_share():
    sigma = torch.tensor([4.0, 2.0, 1.0, 1.0])  # squares 16, 4, 1, 1 of 22
    assert choose_ranks(sigma, (9,), 1 / 22 - 1e-9) == (1,)
    assert choose_ranks(sigma, (9,), 2 / 22 - 1e-9) == (2,)
    assert choose_ranks(sigma, (9,), 3 / 22) == (3,)
    assert choose_ranks(sigma, (9, 9), 3 / 22) == (2, 2)  # rounded up to a multiple of K
    assert choose_ranks(sigma, (9, 9, 9), 0.9) == (2, 1, 1)  # there are no more than q


CHOICES = ("trailing", "leading", "random")


@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("directions", CHOICES)
@pytest.mark.parametrize("shape", [(12, 20), (17, 9)])
def test_the_parts_sum_to_the_weight(shape, directions, partition):
    linear = nn.Linear(shape[1], shape[0]).double()
    config = MASMConfig(num_subspaces=3, subspace_rank=[2, 3, 1], directions=directions, partition=partition)
    layer = MASMLinear.from_linear(linear, config)
    u, s, v = layer.u.detach(), layer.s.detach(), layer.v.detach()
    subspaces = [(u[a:b].mT * s[a:b]) @ v[a:b] for a, b in zip(layer.offsets, layer.offsets[1:])]
    total = layer.principal + sum(subspaces)
    assert (total - linear.weight).norm() <= 1e-14 * linear.weight.norm()
    # orthonormal factors, orthogonal to the principal part, and singular values of W itself
    eye = torch.eye(6, dtype=torch.float64)
    assert (u @ u.mT - eye).norm() < 1e-12 and (v @ v.mT - eye).norm() < 1e-12
    assert (layer.principal.mT @ u.mT).norm() < 1e-12 and (layer.principal @ v.mT).norm() < 1e-12
    sigma = torch.linalg.svdvals(linear.weight.detach())
    assert torch.allclose(s, sigma[list(layer.directions)], atol=1e-12)
    assert 0 < layer.energy < 1
    if directions != "random":
        ends = range(6) if directions == "leading" else range(len(sigma) - 6, len(sigma))
        assert sorted(layer.directions) == list(ends)


def test_trailing_is_the_default_and_leading_holds_more():
    linear = nn.Linear(16, 16)
    layers = {name: MASMLinear.from_linear(linear, MASMConfig(directions=name)) for name in CHOICES}
    default = MASMLinear.from_linear(linear, MASMConfig())
    for factor in ("principal", "u", "s", "v"):
        assert torch.equal(getattr(default, factor), getattr(layers["trailing"], factor))
    assert layers["trailing"].energy < layers["random"].energy < layers["leading"].energy


@pytest.mark.parametrize("name", ["directions", "partition"])
def test_an_unknown_choice_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match=f"MASMConfig.{name} must be one of .*, got 'best'"):
        MASMConfig(**{name: "best"})
    registry = {"directions": DIRECTIONS, "partition": PARTITIONS}[name]
    with pytest.raises(ValueError, match=f"'best'; there are {', '.join(registry)}"):
        registry["best"]


def converted(config, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
    base = {name: p.detach().clone() for name, p in model.state_dict().items()}
    report = convert(model, config, use_cache=False, progress=False)
    return model, base, report


@pytest.mark.parametrize("directions", CHOICES)
def test_convert_save_and_load(tmp_path, directions, monkeypatch):
    config = MASMConfig(target_modules="0", subspace_rank=2, directions=directions)
    model, base, report = converted(config)
    x = torch.randn(5, 10)
    plain = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
    plain.load_state_dict(base)
    assert torch.allclose(model(x), plain(x), atol=1e-6) and report.layers[0].energy == model[0].energy
    with torch.no_grad():
        model[0].s.mul_(1.5)
    save_adapter(model, tmp_path)
    monkeypatch.setattr(torch.linalg, "svd", lambda *a, **k: pytest.fail("SVD"))
    load_adapter(plain, tmp_path)
    assert torch.equal(plain(x), model(x)) and plain[0].directions == model[0].directions
    assert plain.masm_config.directions == directions


def test_an_adapter_of_other_directions_than_its_config_is_refused(tmp_path):
    model, base, _ = converted(MASMConfig(target_modules="0", subspace_rank=2))
    with pytest.raises(ValueError, match="was cut along others"):
        save_adapter(model, tmp_path, config=MASMConfig(target_modules="0", subspace_rank=2, directions="leading"))
    path = save_adapter(model, tmp_path)
    record = json.loads(path.read_text())
    for change, match in (("leading", "was cut along others"), (None, "but the layer records none")):
        record["config"]["directions"] = "leading"
        if change is None:
            record["layers"]["0"]["directions"] = None
        record["sha256"] = digest_of(record)
        path.write_text(json.dumps(record))
        plain = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
        plain.load_state_dict(base)
        with pytest.raises(AdapterError, match=match):
            load_adapter(plain, tmp_path)


def test_an_adapter_from_before_there_was_a_choice_is_trailing(tmp_path):
    model, base, _ = converted(MASMConfig(target_modules="0", subspace_rank=2))
    path = save_adapter(model, tmp_path)
    record = json.loads(path.read_text())
    del record["config"]["directions"], record["layers"]["0"]["directions"]
    record["sha256"] = digest_of(record)
    path.write_text(json.dumps(record))
    plain = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
    plain.load_state_dict(base)
    load_adapter(plain, tmp_path)
    assert torch.equal(plain[0].principal, model[0].principal)
    save_adapter(plain, tmp_path)  # and can be saved again
    assert trailing(3) == [2, 1, 0]


def test_choices_of_ones_own():
    @DIRECTIONS.register("every_second")
    def every_second(q, digest):
        return [*range(0, q, 2), *range(1, q, 2)]

    @PARTITIONS.register("reversed_runs")
    def reversed_runs(ranks):
        return PARTITIONS["contiguous"](ranks[::-1])[::-1]

    try:
        config = MASMConfig(subspace_rank=[1, 2, 1], directions="every_second", partition="reversed_runs")
        layer = MASMLinear.from_linear(nn.Linear(10, 9), config)
        assert layer.directions == (6, 2, 4, 0)
    finally:
        del DIRECTIONS._entries["every_second"], PARTITIONS._entries["reversed_runs"]


def test_a_state_of_another_base_brings_its_directions(tmp_path):
    config = MASMConfig(target_modules="0", subspace_rank=2, directions="random")
    model, base, _ = converted(config)
    other, _, _ = converted(config, seed=1)
    other.load_state_dict(model.state_dict())
    record_base(other)
    save_adapter(other, tmp_path)
    plain = nn.Sequential(nn.Linear(10, 12), nn.ReLU(), nn.Linear(12, 4))
    plain.load_state_dict(base)
    load_adapter(plain, tmp_path)
    assert sorted(plain[0].directions) == sorted(model[0].directions) != sorted(other[0].directions)


def test_a_state_along_other_directions_is_not_recorded_as_ours(tmp_path):
    """The factors come from the state; the config of the model that loaded it tells another choice."""
    linear = torch.nn.Linear(16, 12)
    models = {}
    for name in ("trailing", "leading"):
        model = torch.nn.Sequential(copy.deepcopy(linear))
        convert(
            model, MASMConfig(target_modules="0", subspace_rank=2, directions=name), progress=False, use_cache=False
        )
        models[name] = model
    models["trailing"].load_state_dict(models["trailing"].state_dict())
    save_adapter(models["trailing"], tmp_path / "own")
    models["trailing"].load_state_dict(models["leading"].state_dict())
    with pytest.raises(ValueError, match="made along other singular directions than"):
        save_adapter(models["trailing"], tmp_path / "other")


def test_an_adapter_with_a_choice_that_is_not_registered_says_so(tmp_path):
    @PARTITIONS.register("reversed_runs")
    def reversed_runs(ranks):
        return PARTITIONS["contiguous"](ranks)[::-1]

    try:
        model = torch.nn.Sequential(torch.nn.Linear(16, 12))
        config = MASMConfig(target_modules="0", subspace_rank=2, partition="reversed_runs")
        convert(model, config, progress=False, use_cache=False)
        save_adapter(model, tmp_path)
    finally:
        del PARTITIONS._entries["reversed_runs"]
    with pytest.raises(AdapterError, match="partition='reversed_runs', which is not registered here"):
        load_adapter(torch.nn.Sequential(torch.nn.Linear(16, 12)), tmp_path)
