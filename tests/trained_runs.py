"""Trained run folders for tests of what reads them: seconds to train, no use as detectors."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import tiny
from masm_detect.data.crop_recipe import CropRecipe, write_recipe
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.training.run import train

TILE = CropRecipe("tile", 28)


def tiny_run(folder: Path, recipe: CropRecipe | None = TILE, method: str = "probe") -> Path:
    """A run of `method` on 28 px images whose `crops.json` is `recipe`; data/ and backbone/ are beside it."""
    data = tiny.write_data(folder / "data")
    if recipe is not None:
        write_recipe(data, recipe)
    tiny.detector().backbone.model.save_pretrained(folder / "backbone")
    train(tiny.run_config(data, folder / "backbone", folder / "run", method))
    return folder / "run"


def face_recipe(size: int = 64) -> CropRecipe:
    """Faces found by the default detector."""
    return CropRecipe("face", size, 1.3, MtcnnDetector().name, "largest")


def face_photograph() -> np.ndarray:
    """RGB uint8 [512, 512, 3] with one face, from a wheel."""
    from skimage.data import astronaut

    return astronaut()


def write_rgb(path: Path, rgb: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    return path
