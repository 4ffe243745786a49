"""`method.quantize`: every method trains on frozen weights of 8 bits, and a run is scored on the same weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from masm_detect.config import ConfigError, MethodConfig
from masm_detect.evaluation.runs import load_run
from masm_detect.export.plain import make_plain
from masm_detect.results import read_json
from masm_detect.training.run import train
from torch import nn

from masm_ext.nn.quantized_linear import QuantizedLinear
from masm_ext.quantized_weight import is_quantized
from masm_ext.wrappers import modules_of

pytest.importorskip("torchao", reason="method.quantize needs torchao")


@pytest.mark.parametrize("method", ["masm", "masm-nomask", "probe", "ln", "bitfit", "lora", "effort", "osf"])
def test_a_run_is_scored_on_the_weights_that_it_was_trained_on(tmp_path, seed, method):
    if method in ("lora", "osf"):
        pytest.importorskip("peft")
    data = tiny.write_data(tmp_path / "data", seed)
    tiny.detector().backbone.model.save_pretrained(tmp_path / "backbone")
    config = tiny.run_config(data, tmp_path / "backbone", tmp_path / "run", method)
    config = replace(config, method=replace(config.method, quantize="int8"), optim=replace(config.optim, epochs=1))
    result = train(config)
    metrics = read_json(tmp_path / "run" / "metrics.json")["quantization"]
    assert metrics["format"] == "int8" and metrics["weights"] >= 4 and 0 < metrics["largest_rounding"] < 0.02
    _, loaded = load_run(tmp_path / "run")
    for detector in (result.detector, loaded):
        assert modules_of(detector, QuantizedLinear) and not is_quantized(detector.head.weight)
    images = torch.randn(3, 3, 28, 28)
    with torch.no_grad():
        expected = result.detector.eval()(images)
        torch.testing.assert_close(loaded.eval()(images), expected, rtol=0, atol=0)
        make_plain(loaded)
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)
    linears = [layer for layer in loaded.modules() if isinstance(layer, nn.Linear)]
    assert linears and all(type(layer) is nn.Linear for layer in linears)


def test_a_resumed_run_is_the_same(tmp_path, monkeypatch):
    data = tiny.write_data(tmp_path / "data")
    tiny.detector().backbone.model.save_pretrained(tmp_path / "backbone")
    configs = [tiny.run_config(data, tmp_path / "backbone", tmp_path / name) for name in ("whole", "cut")]
    whole, cut = (replace(config, method=replace(config.method, quantize="float8")) for config in configs)
    expected = train(whole).detector.state_dict()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.die_at(7, patch)
        train(cut)
    found = train(replace(cut, resume=True)).detector.state_dict()
    trained = [name for name in expected if name.rpartition(".")[2] in ("u", "s", "v") or "head" in name]
    assert trained and all(torch.equal(found[name], expected[name]) for name in trained)


def test_full_fine_tuning_has_nothing_to_quantise():
    with pytest.raises(ConfigError, match="null for the method full"):
        MethodConfig(name="full", quantize="int8")
