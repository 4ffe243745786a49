"""The crop recipe travels from the prepared data to the run, and differences are found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from masm_detect.config import ConfigError
from masm_detect.data.crop_recipe import (
    CropRecipe,
    RecipeError,
    check_same_crops,
    read_recipe,
    recipe_of,
    write_recipe,
)
from prepare_runs import run as prepare
from trained_runs import TILE, tiny_run
from video_files import write_image

FACE = CropRecipe("face", 256, 1.3, "mtcnn", "largest")


def test_prepare_writes_what_it_did(tmp_path):
    for kind in ("real", "fake-x"):
        write_image(tmp_path / "source" / kind / "a.png")
    prepare(tmp_path / "source", tmp_path / "out", scale=1.5)
    assert read_recipe(tmp_path / "out") == CropRecipe("face", 32, 1.5, "bright-1", "largest")
    # beside the JSON file that masm train reads, and in the folder of the crops
    assert (
        recipe_of([str(tmp_path / "out" / "set.json")])
        == recipe_of([str(tmp_path / "out")])
        == read_recipe(tmp_path / "out")
    )


def test_a_run_keeps_the_recipe_of_its_data(tmp_path):
    assert read_recipe(tiny_run(tmp_path)) == TILE


def test_different_data_sets_are_refused(tmp_path):
    for name, recipe in (("a", FACE), ("b", replace(FACE, scale=1.5)), ("c", None), ("d", FACE)):
        (tmp_path / name).mkdir()
        if recipe is not None:
            write_recipe(tmp_path / name, recipe)
    a, b, c, d = (str(tmp_path / name) for name in "abcd")
    assert recipe_of([a, d]) == FACE
    assert FACE.differences(replace(FACE, faces="mask")) == []  # one set may need masks, the other not
    assert recipe_of([a, c]) is None  # nothing is known of c
    with pytest.raises(ConfigError, match=r"scale 1\.3 against 1\.5"):
        recipe_of([a, b])
    check_same_crops(FACE, [a, c, "hf:some/set"], "run")
    check_same_crops(None, [a], "run")
    with pytest.raises(RecipeError, match=r"b was not cut as .* of my-run \(scale 1\.3 against 1\.5\).*--as-is"):
        check_same_crops(FACE, [a, b], "my-run")


@pytest.mark.parametrize(
    "content",
    ['{"format": "other"}', "[]", '{"format": "masm-detect-crops", "version": 1, "region": "tile", "side": 3}'],
)
def test_damaged_recipe(tmp_path, content):
    (tmp_path / "crops.json").write_text(content)
    with pytest.raises(RecipeError, match=r"crops\.json"):
        read_recipe(tmp_path)


def test_recipes_that_cannot_be(tmp_path):
    for values in (
        {"region": "tile", "size": 8},
        {"region": "face", "size": 64},
        {"region": "tile", "size": 64, "scale": 1.3},
    ):
        with pytest.raises(RecipeError):
            CropRecipe(**values)
    write_recipe(tmp_path, FACE)
    assert json.loads((tmp_path / "crops.json").read_text())["scale"] == 1.3
