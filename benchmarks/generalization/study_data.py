"""The images of the studies, read from a folder of data sets and kept in memory: nothing of them is written anywhere.

A sample is a tile of 112 x 112 pixels, cut without resampling, because the traces that tell a forgery are in single
pixels. Its `video` is the image, whose score is the mean over its tiles; its `group` is what intervals leave out as
one: the photograph, or the pair of a real frame and its forgery. `split` is "pool" (training and validation are drawn
from it) or "test"; which, is a function of the group's name alone.
"""

from __future__ import annotations

import csv
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from masm_detect.data.decode import decode_image, encode_jpeg, read_image
from masm_detect.data.forgeries import FAMILIES, forge
from masm_detect.data.sample import Sample
from masm_detect.data.transforms import resize_image

TILE = 112
#: Corners (top, left) of the tiles of an image, from the centre of the image.
QUARTERS = ((-TILE, -TILE), (-TILE, 0), (0, -TILE), (0, 0))
CENTRE = ((-TILE // 2, -TILE // 2),)


class DataMissing(FileNotFoundError):
    """A data set is not where it was looked for."""


@dataclass(frozen=True)
class Images:
    """Tiles, and their pixels, uint8 [112, 112, 3], by `Sample.path`."""

    samples: list[Sample]
    images: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Picture:
    """One image: its pixels, uint8 [H, W, 3], and what is known of it."""

    rgb: np.ndarray
    dataset: str
    method: str
    name: str
    group: str
    part: str


@lru_cache(maxsize=4)
def load(name: str, folder: Path) -> Images:
    """The data set called `name`, a key of `DATASETS`, under `folder`; raises DataMissing."""
    pictures, corners = DATASETS[name]
    samples: list[Sample] = []
    images: dict[str, np.ndarray] = {}
    for picture in pictures(folder):
        video = f"{picture.dataset}/{picture.method}/{picture.name}"
        height, width = picture.rgb.shape[:2]
        for number, (down, right) in enumerate(corners):
            top, left = height // 2 + down, width // 2 + right
            path = f"{video}-{number}"
            tile = np.ascontiguousarray(picture.rgb[top : top + TILE, left : left + TILE])
            images[path] = tile
            group = f"{picture.dataset}/{picture.group}"
            label = int(picture.method != "real")
            samples.append(Sample(path, label, picture.dataset, picture.method, video, picture.part, group))
    return Images(samples, images)


def ffhq_gan(folder: Path) -> Iterator[_Picture]:
    """FFHQ photographs, and faces of StyleGAN 1 and 2, all 256 px and of one JPEG history. Photographs with a number
    below 600 are the pool.
    """
    for source in ("real", "fake-stylegan1", "fake-stylegan2"):
        method = source.removeprefix("fake-")
        for file in _files(folder / "ffhq-gan" / source):
            part = _half(int(file.stem) < 600) if method == "real" else _half(_draw(file.stem) < 0.5)
            yield _Picture(read_image(file), "ffhq-gan", method, file.stem, f"{method}/{file.stem}", part)


def dfdc(folder: Path) -> Iterator[_Picture]:
    """Face crops of DFDC, 224 px: a frame and its forgery are one group. `dfdc-crops`, of another source and JPEG
    quality, are for the test only; their group is the video.
    """
    table = folder / "dfdc-pairs" / "pairs.csv"
    if not table.is_file():
        raise DataMissing(f"{table} is absent")
    with table.open(newline="") as rows:
        pairs = [(row["real"], row["fake"]) for row in csv.DictReader(rows)]
    for real, fake in pairs:
        group = Path(real).stem
        part = _half(_draw(group) < 0.6)
        for source, name in (("real", real), ("fake-dfdc", fake)):
            method = source.removeprefix("fake-")
            rgb = read_image(folder / "dfdc-pairs" / source / name)
            yield _Picture(rgb, "dfdc-pairs", method, Path(name).stem, group, part)
    for source, method in (("real", "real"), ("fake-dfdc", "dfdc-crops")):
        for file in _files(folder / "dfdc-crops" / source):
            yield _Picture(read_image(file), "dfdc-crops", method, file.stem, file.stem.rpartition("_")[0], "test")


def families(folder: Path) -> Iterator[_Picture]:
    """Forgeries of our own making on FFHQ photographs: the tile of a photograph, and every family of
    `masm_detect.data.forgeries` on the same tile, all saved once more as JPEG of one quality.
    """
    files = list(_files(folder / "ffhq-gan" / "real"))
    with ThreadPoolExecutor() as threads:
        for pictures in threads.map(_forged, files):
            yield from pictures


def sources(folder: Path) -> Iterator[_Picture]:
    """A control: real photographs of three sources, none of them forged. Those of Unsplash and LFW are listed as
    forgeries, so that a study measures how well the source of a photograph is told. All are resized to 256 px and
    saved once more with one JPEG quality.
    """
    for source, method in (("ffhq-gan", "real"), ("unsplash-men", "unsplash"), ("lfw-politicians", "lfw")):
        for file in _files(folder / source / "real"):
            # LFW's files are named after the person, who is in several of them
            group = file.stem.rpartition("_")[0] if method == "lfw" else file.stem
            if method == "real" and int(file.stem) % 4:
                continue  # as many as of Unsplash, about
            rgb = decode_image(encode_jpeg(resize_image(read_image(file), 256), 75), str(file))
            yield _Picture(rgb, "sources", method, file.stem, f"{method}/{group}", _half(_draw(group) < 0.5))


def _forged(file: Path) -> list[_Picture]:
    rgb = read_image(file)
    part = _half(int(file.stem) < 600)
    height, width = rgb.shape[:2]
    pictures = []
    for number, (down, right) in enumerate(QUARTERS if part == "pool" else CENTRE):
        top, left = height // 2 + down, width // 2 + right
        tile = np.ascontiguousarray(rgb[top : top + TILE, left : left + TILE])
        rng = np.random.default_rng([int(file.stem), number])
        quality = int(rng.integers(85, 96))
        for method in ("real", *FAMILIES):
            version = tile if method == "real" else forge(method, tile, rng)[0]
            jpeg = encode_jpeg(version, quality)
            name = f"{file.stem}-{number}"
            pictures.append(_Picture(decode_image(jpeg, name), "families", method, name, file.stem, part))
    return pictures


def _files(folder: Path) -> Iterator[Path]:
    if not folder.is_dir():
        raise DataMissing(f"{folder} is absent")
    return iter(sorted(path for path in folder.iterdir() if path.suffix in (".jpg", ".png")))


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on a name only; the built-in hash changes with every process."""
    return zlib.crc32(name.encode()) / 2**32


def _half(pool: bool) -> str:
    return "pool" if pool else "test"


DATASETS: dict[str, tuple[Callable[[Path], Iterator[_Picture]], tuple[tuple[int, int], ...]]] = {
    "ffhq-gan": (ffhq_gan, QUARTERS),
    "dfdc": (dfdc, CENTRE),
    "families": (families, CENTRE),
    "sources": (sources, QUARTERS),
}
