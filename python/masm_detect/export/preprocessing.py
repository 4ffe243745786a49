"""How an image becomes the input of an exported model, as `preprocessing.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from masm_detect.results import read_json

from .format import Run

#: How the crops were cut out of videos and photographs; written by `masm prepare`, kept with the run.
CROPS = "crops.json"
#: Parameters that turn logits into probabilities; written by `masm calibrate`.
CALIBRATION = "calibration.json"


def preprocessing_of(run: Run) -> dict[str, Any]:
    """The content of `preprocessing.json`: input size, pixel statistics, resizing, labels and the recipe of the crops.

    "crops" is null where the run does not know how its crops were made.
    """
    backbone, data = run.detector.backbone, run.config.data
    crops = run.folder / CROPS
    return {
        "size": backbone.image_size,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
        "scale": "pixels / 255, minus mean, divided by std, per RGB channel",
        "crop": data.crop,
        "interpolation": "bicubic, antialiased (Pillow)" if data.crop == "resize" else None,
        "normalize_first": None if data.normalize_first is None else list(data.normalize_first),
        "input": f"pixel_values, float32 [batch, 3, {backbone.image_size}, {backbone.image_size}], RGB",
        "output": "logits, float32 [batch]; above 0: fake",
        "labels": {"0": "real", "1": "fake"},
        "crops": read_json(crops) if crops.is_file() else None,
    }


def copy_json(name: str, source: Path, target: Path) -> bool:
    """Copy the JSON file `name` of a run to an export; False if the run has none."""
    path: Path = source / name
    if not path.is_file():
        return False
    read_json(path)  # a broken file is reported here, not by the user of the export
    (target / name).write_bytes(path.read_bytes())
    return True
