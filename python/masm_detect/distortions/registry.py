"""The table of distortions, and the cells (a distortion at one level) that are chosen from it.

A new distortion is one function in `images.py` or `videos.py` and one line in `DISTORTIONS`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from masm_detect.errors import UserError

from . import images, videos


class DistortionError(UserError, ValueError):
    """A distortion or level that does not exist."""


@dataclass(frozen=True)
class Distortion:
    """A distortion with its levels.

    Attributes:
        name: on the command line and in result files
        title: in figures
        suite: the collection that it belongs to
        apply: the function, of `images` or, for `video`, of `videos`
        levels: name of a level -> value, from mild to strong
        text: what a value means, e.g. "quality {:g}"
        video: it changes the frames of a video together
    """

    name: str
    title: str
    suite: str
    apply: Callable
    levels: dict[str, float]
    text: str
    video: bool


@dataclass(frozen=True)
class Cell:
    """A distortion at one level; clean, without distortion, if it has none.

    Attributes:
        distortion: None: clean
        level: name of the level; "": clean
    """

    distortion: Distortion | None = None
    level: str = ""

    @property
    def name(self) -> str:
        """E.g. "jpeg:50", or "clean"."""
        return "clean" if self.distortion is None else f"{self.distortion.name}:{self.level}"

    @property
    def value(self) -> float | None:
        """What the function takes; None: clean."""
        return None if self.distortion is None else self.distortion.levels[self.level]

    @property
    def text(self) -> str:
        """The level in words."""
        return "" if self.distortion is None else self.distortion.text.format(self.value)

    @property
    def video(self) -> bool:
        """Whether it changes the frames of a video together."""
        return self.distortion is not None and self.distortion.video

    def image(self, rgb: np.ndarray, seed: int, key: str) -> np.ndarray:
        """An image RGB uint8 [H, W, 3] under a distortion of images.

        Args:
            rgb: the image.
            seed: of the whole examination.
            key: of the image. The draws depend on seed, distortion and key only: neither on the order nor on the other
                cells. The levels of a distortion share their draws.
        """
        if self.distortion is None:
            return rgb
        return self.distortion.apply(rgb, self.value, generator(seed, self.distortion.name, key))

    def clip(self, frames: Sequence[np.ndarray]) -> list[np.ndarray]:
        """T frames RGB uint8 [H, W, 3] of a video under a distortion of videos."""
        return self.distortion.apply(frames, self.value)


CLEAN = Cell()


def generator(seed: int, name: str, key: str) -> np.random.Generator:
    """The random numbers of the distortion `name` on the image `key`."""
    digest = hashlib.sha256(f"{name}\0{key}".encode("utf-8", "surrogatepass")).digest()
    return np.random.default_rng([seed, *np.frombuffer(digest[:16], np.uint32).tolist()])


DEEPER, PICTURES, CODECS = SUITES = ("deeperforensics", "pictures", "codecs")


def _deeper(name: str, title: str, apply: Callable, text: str, *values: float) -> Distortion:
    """A distortion of DeeperForensics-1.0, whose levels are called 1 to 5."""
    levels = {str(level): value for level, value in enumerate(values, 1)}
    return Distortion(name, title, DEEPER, apply, levels, text, apply in videos.ENCODERS)


def _named(name: str, title: str, suite: str, apply: Callable, text: str, *values: float) -> Distortion:
    """A distortion whose levels are called by their values."""
    return Distortion(name, title, suite, apply, {f"{v:g}": v for v in values}, text, apply in videos.ENCODERS)


#: Name -> distortion, in the order of the results.
DISTORTIONS: dict[str, Distortion] = {
    one.name: one
    for one in (
        _deeper("saturation", "colour saturation (CS)", images.saturation, "chroma x {:g}", 0.4, 0.3, 0.2, 0.1, 0),
        _deeper("contrast", "contrast (CC)", images.contrast, "pixels x {:g}", 0.85, 0.725, 0.6, 0.475, 0.35),
        _deeper("blocks", "grey blocks (BW)", images.blocks, "{:g} blocks", 16, 32, 48, 64, 80),
        _deeper("noise", "Gaussian noise (GNC)", images.noise, "variance {:g}", 0.001, 0.002, 0.005, 0.01, 0.05),
        _deeper("blur", "Gaussian blur (GB)", images.blur, "kernel {:g} px", 7, 9, 13, 17, 21),
        _deeper("pixelate", "pixelation", images.pixelate, "1/{:g} of the size", 2, 3, 4, 5, 6),
        _deeper("vc", "video compression (VC)", videos.h264, "H.264 crf {:g}", 30, 32, 35, 38, 40),
        _named("jpeg", "JPEG", PICTURES, images.jpeg, "quality {:g}", 90, 70, 50, 30, 10),
        _named("resize", "resize and back", PICTURES, images.resize, "{:g}% of the size", 75, 50, 25),
        _named("thumbnail", "thumbnail", PICTURES, images.thumbnail, "{:g} px", 256, 128),
        _named("social", "posted twice", PICTURES, images.social, "{:g} px, JPEG 85, 75", 1080, 720),
        _named("messenger", "messenger, twice", PICTURES, images.messenger, "{:g} px, JPEG 60, 60", 640),
        _named("h264", "H.264", CODECS, videos.h264, "crf {:g}", 23, 30, 35, 40),
        _named("hevc", "HEVC", CODECS, videos.hevc, "crf {:g}", 28, 35),
    )
}  # fmt: skip


def choose_cells(names: str | None = None, quick: bool = False) -> list[Cell]:
    """The clean cell, and the chosen ones in the order of `DISTORTIONS`.

    Args:
        names: separated by commas: a distortion ("jpeg": all its levels), a level of it ("jpeg:50"), or a suite
            (`SUITES`); None: everything.
        quick: of each chosen distortion only one level, the middle one of those chosen.

    Raises:
        DistortionError: a name that does not exist.
    """
    chosen: dict[str, set[str]] = {}
    for name in [*DISTORTIONS] if names is None else [part.strip() for part in names.split(",")]:
        first, colon, level = name.partition(":")
        members = [one for one in DISTORTIONS.values() if one.suite == first and not colon] or [_known(first, name)]
        for one in members:
            if colon and level not in one.levels:
                raise DistortionError(f"{first} has no level {level!r}; it has {', '.join(one.levels)}")
            chosen.setdefault(one.name, set()).update([level] if colon else one.levels)
    cells = [CLEAN]
    for one in DISTORTIONS.values():
        levels = [level for level in one.levels if level in chosen.get(one.name, ())]
        cells += [Cell(one, level) for level in (levels[len(levels) // 2 :][:1] if quick else levels)]
    return cells


def _known(first: str, name: str) -> Distortion:
    if first not in DISTORTIONS:
        raise DistortionError(
            f"--cells names {name!r}; the distortions are {', '.join(DISTORTIONS)}, and the suites {', '.join(SUITES)} "
            "(a level is written as jpeg:50)"
        )
    return DISTORTIONS[first]
