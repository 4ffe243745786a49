"""Run settings: limits with clear messages, and the YAML round trip."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest
from masm_detect.config import (
    ConfigError,
    DataConfig,
    MasmOptions,
    MethodConfig,
    ModelConfig,
    OptimConfig,
    RuntimeConfig,
    TrainConfig,
)
from masm_detect.config_files import load_config, save_config


def test_round_trip(tmp_path):
    config = TrainConfig(
        data=DataConfig(paths=["a", "b.json"], methods=["x"], prefix_map={"/old": "/new"}, normalize_first=(64, 90)),
        method=MethodConfig(name="masm", lr=0.1 + 0.2, masm=MasmOptions(subspace_rank=[1, 2], num_subspaces=2)),
        optim=OptimConfig(grad_clip=None),
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_one_word_is_a_list_of_one(tmp_path):
    config = DataConfig(paths="a", methods="x", splits="train")
    assert config == DataConfig(paths=["a"], methods=["x"], splits=["train"])
    (tmp_path / "config.yaml").write_text("data: {paths: a, methods: x, splits: null}")
    assert load_config(tmp_path / "config.yaml").data == DataConfig(paths=["a"], methods=["x"])


@pytest.mark.parametrize("kind", [DataConfig, ModelConfig, MasmOptions, MethodConfig, OptimConfig, RuntimeConfig])
def test_every_field_is_explained(kind):
    explained = re.findall(r"^        (\w+): \S", kind.__doc__.split("Attributes:")[1], re.MULTILINE)
    assert explained == [field.name for field in fields(kind)]


@pytest.mark.parametrize("text", ["{data: {paths: [a], workers: 3}}", "{data: {paths: [a]}}"])
def test_runs_of_older_versions_load(tmp_path, text):
    """They had data.workers, on which no result depends."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config.data == DataConfig(paths=["a"]) and config.runtime.workers is None


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DataConfig(val_fraction=1.5), "data.val_fraction is 1.5"),
        (lambda: RuntimeConfig(workers=-1), "runtime.workers is -1.*or null"),
        (lambda: OptimConfig(epochs=0), "optim.epochs is 0"),
        (lambda: MethodConfig(name="nope"), "method.name is 'nope'.*probe"),
        (lambda: MethodConfig(lr=-1.0), "method.lr is -1.0"),
        (lambda: TrainConfig(out=""), "out is ''"),
    ],
)
def test_impossible_settings_say_why(build, message):
    with pytest.raises(ConfigError, match=message):
        build()


@pytest.mark.parametrize(
    "text", ["optim: {epochs: three}", "optim: {epoch: 3}", "- a\n- b", "a: [1", "optim: {epochs: 0}"]
)
def test_broken_file_is_named(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"config\.yaml is not a valid run configuration"):
        load_config(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        load_config(tmp_path / "config.yaml")
