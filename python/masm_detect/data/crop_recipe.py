"""How the images of a data set were cut out of pictures and videos: kept beside the data set, and in every run.

`masm prepare` writes `crops.json` beside its crops. `masm train` copies it into the run folder, and `masm predict`
cuts new pictures and videos in the same way: a detector that sees faces cut by other rules gives other scores.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from masm_detect.errors import ConfigError, UserError
from masm_detect.results import read_json, write_json

FILE = "crops.json"
FORMAT = "masm-detect-crops"
VERSION = 1
#: Most tiles of a picture, by default.
TILES = 36


class RecipeError(UserError, ValueError):
    """A crop recipe that cannot be used, or that differs from the one of a run."""


@dataclass(frozen=True)
class CropRecipe:
    """How an image is cut out of a picture or of a frame.

    Attributes:
        region: face: the face, aligned by five points (`faces.align_crop`); tile: squares of the picture, not resampled
        size: side of a crop in pixels
        scale: for faces: size of a crop relative to the face
        detector: for faces: name of the face detector
        faces: for faces: which faces of a frame were cut (`prepare.prepare`). It decides what `masm predict` cuts by
            default, and is no difference between data sets: one of them may need masks.
    """

    region: Literal["face", "tile"]
    size: int
    scale: float | None = None
    detector: str | None = None
    faces: Literal["largest", "all", "mask"] | None = None

    def __post_init__(self) -> None:
        face = self.region == "face"
        if self.region not in ("face", "tile") or not isinstance(self.size, int) or self.size < 16:
            raise RecipeError(f"a crop recipe needs the region face or tile and a size of at least 16, got {self}")
        if any(face != (value is not None) for value in (self.scale, self.detector, self.faces)):
            raise RecipeError(f"scale, detector and faces belong to the region face, got {self}")

    def differences(self, other: CropRecipe) -> list[str]:
        """What differs from the recipe `other`, one phrase each.

        Args:
            other: another recipe.
        """
        mine, theirs = asdict(self), asdict(other)
        return [
            f"{name} {mine[name]} against {theirs[name]}"
            for name in mine
            if mine[name] != theirs[name] and name != "faces"
        ]


def write_recipe(folder: Path | str, recipe: CropRecipe) -> None:
    """Write `crops.json` to a folder."""
    write_json(Path(folder) / FILE, {"format": FORMAT, "version": VERSION, **asdict(recipe)})


def read_recipe(folder: Path | str) -> CropRecipe | None:
    """The recipe in a folder; None if it has no `crops.json`. Raises RecipeError for one that cannot be used."""
    path = Path(folder) / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or content.get("version") != VERSION:
        raise RecipeError(f"{path} is no crop recipe that this version reads ({FORMAT}, version {VERSION})")
    try:
        return CropRecipe(**{name: value for name, value in content.items() if name not in ("format", "version")})
    except TypeError as error:
        raise RecipeError(f"{path} is damaged ({error})") from error


def recipe_of(paths: Iterable[str]) -> CropRecipe | None:
    """The recipe of data sets, which lies in the folder itself, or beside a JSON file or split folder.

    None if one of them has none. Raises ConfigError if two of them were cut differently.
    """
    found: dict[str, CropRecipe] = {}
    complete = True
    for path in paths:
        recipe = None if path.startswith("hf:") else (read_recipe(path) or read_recipe(Path(path).absolute().parent))
        complete &= recipe is not None
        if recipe is not None:
            found[path] = recipe
    first = next(iter(found.items()), None)
    for path, recipe in found.items():
        if different := first[1].differences(recipe):
            raise ConfigError(
                f"{first[0]} and {path} were cut differently ({'; '.join(different)}): prepare both with the same "
                "settings, or set as_is to use the images as they are"
            )
    return first[1] if first is not None and complete else None


def check_same_crops(recipe: CropRecipe | None, paths: Iterable[str], run: str) -> None:
    """Raise RecipeError if data sets were cut differently from the training images of the run called `run`.

    Nothing is compared if the run, or a data set, does not record how its images were cut.
    """
    for path in paths:
        other = recipe_of([path])
        if recipe is not None and other is not None and (different := recipe.differences(other)):
            raise RecipeError(
                f"{path} was not cut as the training images of {run} ({'; '.join(different)}): prepare it with the "
                "same settings, or give --as-is to use the images as they are"
            )
