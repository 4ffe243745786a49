"""A method, a metric, a naming rule and a command are each added by one entry of a table, and then work everywhere."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from masm_detect.commands import main as main_module
from masm_detect.commands.main import main
from masm_detect.config import MethodConfig, OptimConfig
from masm_detect.data import groups
from masm_detect.data.folders import read_folder
from masm_detect.data.sample import Sample
from masm_detect.data.splits import assign_splits
from masm_detect.evaluation import metrics
from masm_detect.evaluation.metrics import Metric, evaluate_scores
from masm_detect.methods import registry
from masm_detect.methods.adapters import load_method
from masm_detect.methods.method import MethodSpec, Rates
from masm_detect.models.detector import new_detector
from masm_detect.report.tables import results_table
from masm_detect.training.run import train
from tiny import run_config


class Biases(MethodSpec):
    """Trains the biases of the target layers, and the head."""

    rates = Rates(lr=2e-3)

    def adapt(self, model, names, config):
        for name in names:
            model.get_submodule(name).bias.requires_grad_(True)


@pytest.fixture
def toy(monkeypatch):
    """A module that the tables can name, as a new file of the package would be."""
    module = ModuleType("masm_detect.toy")
    monkeypatch.setitem(sys.modules, "masm_detect.toy", module)
    return module


def test_a_method(toy, monkeypatch, tiny_data, tiny_backbone, tmp_path):
    toy.Biases = Biases
    monkeypatch.setitem(registry.METHODS, "biases", "masm_detect.toy:Biases")
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", optim=OptimConfig(epochs=1, batch_size=4))
    result = train(replace(config, method=MethodConfig(name="biases")))
    assert result.fit.steps == 5 and result.metrics["method"] == "biases"
    trained = [name for name, p in result.detector.named_parameters() if p.requires_grad]
    assert len(trained) == 8 + 2 and all(name.endswith("bias") for name in trained if not name.startswith("head."))
    assert {group["initial_lr"] for group in result.method.optimizer.param_groups} == {2e-3, 3e-3}
    loaded = new_detector(config.model)
    load_method(loaded, MethodConfig(name="biases"), tmp_path / "run" / "adapter")
    for name in trained:
        assert torch.equal(loaded.get_parameter(name), result.detector.get_parameter(name))


def test_a_metric(monkeypatch, tiny_data):
    samples = read_folder(tiny_data)
    scores = np.linspace(0.1, 0.9, len(samples))
    labels = np.array([s.label for s in samples])
    brier = Metric(lambda labels, scores: float(((scores - labels) ** 2).mean()), "Brier")
    monkeypatch.setitem(metrics.METRICS, "brier", brier)
    result = evaluate_scores(samples, scores)
    expected = float(((scores - labels) ** 2).mean())
    assert result["datasets"]["data"]["methods"]["stripes"]["brier"] == pytest.approx(expected)
    [column] = [c for c in results_table({"run": result}).columns if c.header == "Brier"]
    assert list(column.cells) == [f"{expected:.3f}".removeprefix("0")]


def test_a_naming_rule(monkeypatch):
    keys = ["real/anna", "real/bob", "real/eve", "fake-swap/anna+bob"]
    samples = [Sample(key, int(key != "real"), "d", "m", f"d/{key}") for key in keys]
    monkeypatch.delitem(groups.NAMING_RULES, "my set", raising=False)  # the example of CONTRIBUTING.md
    assert len({s.group for s in groups.with_name_groups(samples)}) == 4
    rule = lambda name: tuple(name.split("+")) if "+" in name else ()  # noqa: E731
    monkeypatch.setitem(groups.NAMING_RULES, "swaps", rule)
    grouped = {s.path: s.group for s in groups.with_name_groups(samples)}
    assert {grouped[key] for key in keys if "eve" not in key} == {"d/pair/anna_bob"}
    assert grouped["real/eve"] == "d/real/eve"
    splits = assign_splits("d", keys, (0.5, 0.5, 0))
    assert splits["real/anna"] == splits["real/bob"] == splits["fake-swap/anna+bob"] != splits["real/eve"]


def test_a_naming_rule_that_knows_real_videos(monkeypatch):
    """As of Celeb-DF: a real video is named person_clip, a fake person_person_clip."""
    keys = ["real/id0_0000", "real/id0_0001", "real/id1_0000", "real/id2_0000", "fake-x/id0_id1_0000"]
    samples = [Sample(key, int(not key.startswith("real")), "d", "m", f"d/{key}") for key in keys]
    monkeypatch.setitem(groups.NAMING_RULES, "people", lambda name: tuple(name.split("_")[:-1]))
    found = [s.group for s in groups.with_pair_groups(samples)]
    assert found == ["d/pair/id0_id1"] * 3 + ["d/pair/id2", "d/pair/id0_id1"]


def test_a_command(toy, monkeypatch, capsys):
    toy.HELP = "say a word"
    toy.add_arguments = lambda parser: parser.add_argument("word", type=str)
    toy.run = lambda values: print(f"the word is {values.word}")
    monkeypatch.setitem(main_module.COMMANDS, "say", "masm_detect.toy")
    assert main(["say", "hello"]) == 0
    assert capsys.readouterr().out == "the word is hello\n"
    assert main([]) == 0
    assert "say a word" in capsys.readouterr().out
