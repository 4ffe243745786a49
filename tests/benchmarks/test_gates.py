"""Right before fast: what differs from float64 is refused by the gate of a layer, a group, a step and the optimizer."""

import pytest
import torch
from torch import nn

pytest.importorskip("masm_detect.results", reason="needs the extra masm_ext[detect]")
pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")
CPU = torch.device("cpu")


@pytest.mark.parametrize("mistake", ["scaled output", "no low-rank part", "detached factor", "NaN", "wrong dX"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_refuses_a_wrong_provider(mistake, dtype, layer_of):
    import bench
    import providers

    provider, layer = layer_of("reference", dtype=dtype)
    x, dy = torch.randn(20, 32).to(dtype), torch.randn(20, 24).to(dtype)
    providers.gate(provider, layer, x, dy)  # it is right as it is
    right = type(layer).forward

    class Wrong(type(layer)):
        def forward(self, x):
            if mistake == "scaled output":
                return right(self, x) * 1.05
            if mistake == "no low-rank part":
                return nn.functional.linear(x, self.weight, self.bias)
            if mistake == "NaN":
                return right(self, x) + torch.tensor(float("nan"), dtype=x.dtype)
            if mistake == "wrong dX":
                return right(self, x.detach() + 0.9 * (x - x.detach()))
            low_rank = ((x.to(self.v.dtype) @ self.v.detach().mT) * self.s) @ self.u
            return nn.functional.linear(x, self.weight, self.bias) + low_rank.to(x.dtype)

    layer.__class__ = Wrong
    with pytest.raises(bench.GateError, match="differs from the float64 reference"):
        providers.gate(provider, layer, x, dy)


def test_the_gate_wants_no_gradient_of_masked_blocks(layer_of):
    import bench
    import providers

    provider, layer = layer_of("masm")
    x, dy = torch.randn(20, 32), torch.randn(20, 24)
    layer.mask[1] = False
    assert set(providers.gate(provider, layer, x, dy)) == {"y", "dX", "du", "ds", "dv"}
    kept = layer.mask.clone()

    class Forgetful(type(layer)):  # computes masked gradients all the same
        def forward(self, x):
            self.mask.fill_(True)
            y = super().forward(x)
            self.mask = kept.clone()
            return y

    layer.__class__ = Forgetful
    layer.mask = kept.clone()
    with pytest.raises(bench.GateError, match="du"):
        providers.gate(provider, layer, x, dy)


def test_the_group_suite_runs_and_its_gate_sees_swapped_layers(monkeypatch):
    import bench
    import providers
    from cases import Case, Options
    from suites import group

    values = {"M": 20, "N": 24, "D": 32, "R": 4, "K": 2, "layers": 3}
    case = Case("group", "3 x 24x32/R4", "float32", "frozen", values)
    outcome = group.measure(case, Options(threads=1, seconds=0.01))
    assert outcome.sound and set(outcome.measures["forward"]["providers"]) == {"frozen", "masm", "masm-group"}
    assert set(outcome.errors["masm-group"]) == {"y", "dX", "du", "ds", "dv"}

    weights, biases = [torch.randn(24, 32) / 6 for _ in range(3)], [torch.randn(24) for _ in range(3)]
    model = group.Projections(weights, biases)
    providers.PROVIDERS["masm"].adapt(model, list(group.NAMES), providers.Setting(4, 2))
    assert group.group_projections(model) == 1
    formulas = [providers.PROVIDERS["masm"].formula(getattr(model, name)) for name in group.NAMES]
    x, dys = torch.randn(20, 32), [torch.randn(20, 24) for _ in range(3)]
    group.gate(model, formulas, x, dys)
    with pytest.raises(bench.GateError, match="differs from the float64 reference"):
        group.gate(model, formulas[::-1], x, dys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gate_of_a_step_refuses_one_wrong_layer(dtype, monkeypatch):
    import bench
    import providers
    import training
    from cases import MODELS

    training.gate_step("reference", MODELS["tiny"], dtype, CPU, 2)
    right = providers.Reference.adapt

    def wrong(self, model, names, setting):
        right(self, model, names, setting)
        layer = model.get_submodule(names[3])
        layer.forward = lambda x: nn.functional.linear(x, layer.weight, layer.bias)

    monkeypatch.setattr(providers.Reference, "adapt", wrong)
    with pytest.raises(bench.GateError, match="trained"):
        training.gate_step("reference", MODELS["tiny"], dtype, CPU, 2)


def test_the_optimizer_gate_refuses_a_wrong_step(monkeypatch):
    import bench
    from cases import MODELS
    from suites import optimizer

    shapes, values = MODELS["tiny"].linears[:2], {"K": 4, "masked": 0.5}
    optimizer.gate("eager-loop", shapes, values, 4, CPU)
    right = optimizer.EagerLoop.step

    def wrong(self):
        right(self)
        self.layers[0].s.data += 1e-5  # also moves masked blocks

    monkeypatch.setattr(optimizer.EagerLoop, "step", wrong)
    with pytest.raises(bench.GateError, match="AdamW in float64"):
        optimizer.gate("eager-loop", shapes, values, 4, CPU)


def test_the_eager_loop_sums_what_the_formula_sums():
    from cases import MODELS
    from suites import optimizer

    shapes, values = MODELS["tiny"].linears[:2], {"K": 4, "masked": 0.5}
    runs = [optimizer._prepared(name, shapes, values, 4, CPU)[1] for name in ("eager-loop", "formula")]
    for _ in range(3):
        for run in runs:
            run.step()
    loop, formula = runs
    signal, power = formula.stats.T.view(2, *loop.signal.shape)
    torch.testing.assert_close(loop.signal.double(), signal, rtol=1e-5, atol=0)
    torch.testing.assert_close(loop.power.double(), power, rtol=1e-5, atol=0)
    assert power.any()


def test_the_gate_of_the_penalties_refuses_a_wrong_gradient(monkeypatch):
    import bench
    from cases import MODELS
    from suites import losses

    from masm_ext import MASMConfig

    config = MASMConfig(num_subspaces=4, subspace_rank=1)
    layers = losses.layers_of(MODELS["tiny"].linears[:3], torch.float32, CPU, 4, 4)
    for name in ("stacked", "masm", losses.DECOUPLED):
        assert set(losses.gate(layers, name, config, 1e-4)) == {"loss", "du", "ds", "dv"}
    right = losses.penalty_gradients

    def wrong(layers):
        values, [flat] = right(layers)
        flat[1] *= 1.5  # of the spectral term
        return values, [flat]

    monkeypatch.setattr(losses, "penalty_gradients", wrong)
    with pytest.raises(bench.GateError, match="ds"):
        losses.gate(layers, losses.DECOUPLED, config, 1e-4)
