"""`masm train --recipe`: each recipe trains as it is, but for the size of backbone and schedule."""

from __future__ import annotations

import pytest
import tiny
from command_line import assert_one_line, code_of
from deepfakebench_tree import write_ffpp
from masm_detect.commands.train import complete, recipes_text
from masm_detect.config_files import load_config

RECIPES = ("effort", "fmsd", "gend")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(tmp_path, seed, name):
    data = write_ffpp(tmp_path / "data", seed, pairs=4, splits=("train", "val"))
    tiny.detector().backbone.model.save_pretrained(tmp_path / "backbone")
    backbone = ["--model.backbone", str(tmp_path / "backbone"), "--model.local_files_only=true"]
    small = [*backbone, "--model.image_size", "28"]
    short = ["--optim.epochs", "1", "--optim.batch_size", "4", "--runtime.device", "cpu", "--runtime.progress=false"]
    out = ["--data.paths", str(data), "--out", str(tmp_path / "run")]
    masm = ["--method.masm.mask_min_active", "1"] if name == "fmsd" else []
    assert code_of(["train", "--recipe", name, *small, *short, *out, *masm]) == 0
    config = load_config(tmp_path / "run" / "config.yaml")
    assert config.data.compression == "c23" and config.optim.epochs == 1
    assert "HorizontalFlip" in config.data.augment.albumentations[0]
    assert {"effort": "effort", "gend": "ln", "fmsd": "masm"}[name] == config.method.name


def test_what_follows_a_recipe_is_set_over_it():
    assert complete(["--recipe=gend", "--out", "x"])[0] == "--config"
    assert complete(["--out", "x", "--recipe", "gend"])[2:3] == ["--config"]


def test_an_unknown_recipe_is_one_line(capsys):
    assert code_of(["train", "--recipe", "no-such"]) == 2
    assert_one_line(capsys.readouterr().err, "there is no recipe 'no-such'; the recipes are effort, fmsd, gend")


def test_recipes_are_listed_with_sources_and_differences(capsys):
    assert code_of(["train", "--list_recipes"]) == 0
    text = capsys.readouterr().out
    assert text.strip() == recipes_text()
    for name, link in {"effort": "2411.15633", "gend": "2508.06248", "fmsd": "2601.01041"}.items():
        part = text.partition(f"{name}:\n")[2].partition("file:")[0]
        assert link in part and len(part.splitlines()) > 6
