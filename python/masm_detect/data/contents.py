"""Reads every file of a data set once: damaged files are found before a run, and copies are recognised later."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from masm_ext.progress import Progress

from .content_cache import Content, ContentCache, FileState
from .decode import EIGHT_BIT_MODES, UnreadableImage, check_whole, decode_image, read_bytes
from .perceptual import SIDE, perceptual_hash
from .sample import Sample

#: Files read at a time: disks and networks answer several requests in the time of one.
_THREADS = 8
#: Files given to the threads together; their contents go to the cache together.
_SLICE = 1024
#: Files whose size and time of change one thread looks up in a row.
_STATES = 32
#: Luminance quantization table of the JPEG standard (ITU-T T.81, table K.1), which encoders scale by their quality.
_LUMINANCE = np.array([
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
])  # fmt: skip
_SCALES = np.array([50 / q if q < 50 else 2 - q / 50 for q in range(1, 101)])
_TABLES = np.clip(np.floor(_SCALES[:, None] * _LUMINANCE + 0.5), 1, 255)  # [100, 64], row q - 1 of quality q


def read_contents(samples: Sequence[Sample], progress: bool = False) -> list[Content]:
    """The content of each sample's file, in order: fingerprint, perceptual hash, size, format.

    Files that have not changed since they were last read come from the cache (`content_cache`) and are not opened.

    Raises:
        UnreadableImage: a file is absent, empty, truncated or no image.
    """
    contents = []
    for content in survey([sample.path for sample in samples], progress, stop=True):
        if isinstance(content, UnreadableImage):
            raise content
        contents.append(content)
    return contents


def survey(paths: Sequence[str], progress: bool = False, stop: bool = False) -> list[Content | UnreadableImage]:
    """The content of each file, in order, or the error that says why it cannot be read.

    Args:
        paths: files; a path that occurs several times is read once.
        progress: show a progress bar.
        stop: end with the first error, so that the list is shorter than `paths`.
    """
    unique = {path: os.path.abspath(path) for path in paths}
    names = list(unique)
    found: dict[str, Content | UnreadableImage] = {}
    bar = Progress(total=len(names), unit="file", desc="reading", disable=not progress, leave=False)
    with ThreadPoolExecutor(_THREADS) as pool, ContentCache() as cache, bar:
        for start in range(0, len(names), _SLICE):
            part = names[start : start + _SLICE]
            states = _states(pool, [unique[name] for name in part])
            known = cache.get(states)
            missing = [name for name in part if unique[name] not in known]
            read = dict(zip(missing, pool.map(_read, missing)))
            cache.put(
                [
                    (unique[name], state, content)
                    for name, content in read.items()
                    if isinstance(content, Content) and (state := states[unique[name]]) == FileState.of(name) and state
                ]
            )
            found |= {name: read[name] if name in read else known[unique[name]] for name in part}
            bar.update(len(part))
            if stop and any(isinstance(content, UnreadableImage) for content in read.values()):
                break
    contents = []
    for path in paths:
        if path not in found:
            break
        contents.append(found[path])
    return contents


def describe(data: bytes, name: str) -> Content:
    """The content of an image file from its bytes; UnreadableImage, with `name`, if it is damaged or no image.

    A JPEG is decoded at a fraction of its size only, which is enough for the perceptual hash.
    """
    check_whole(data, name)
    fingerprint = hashlib.blake2b(data, digest_size=8).hexdigest()
    try:
        with Image.open(io.BytesIO(data)) as image:
            (width, height), kind = image.size, {"MPO": "JPEG"}.get(image.format or "", image.format or "")
            quality = jpeg_quality(image.quantization[0]) if 0 in getattr(image, "quantization", {}) else None
            if image.mode not in EIGHT_BIT_MODES:
                raise OSError(f"pixels of mode {image.mode}")
            image.draft("L", (SIDE, SIDE))
            perceptual = perceptual_hash(ImageOps.exif_transpose(image))
    except Exception:  # Pillow raises OSError, SyntaxError, struct.error and more
        # The reader of training decides: it reads 16-bit PNG, and raises UnreadableImage for what it cannot read.
        rgb = decode_image(data, name)
        (height, width), kind, quality = rgb.shape[:2], "", None
        perceptual = perceptual_hash(Image.fromarray(rgb))
    return Content(fingerprint, perceptual, len(data), width, height, kind, quality)


def jpeg_quality(table: Sequence[int]) -> int:
    """The JPEG quality, 1 to 100, whose luminance table is nearest to `table`, 64 numbers in rows.

    The scale is that of libjpeg, which Pillow, OpenCV and most programs use. Others choose tables of their own.
    """
    return int(np.abs(_TABLES - np.asarray(table)).sum(axis=1).argmin()) + 1


def _read(path: str) -> Content | UnreadableImage:
    try:
        return describe(read_bytes(path), path)
    except UnreadableImage as error:
        return error


def _states(pool: ThreadPoolExecutor, paths: Sequence[str]) -> dict[str, FileState | None]:
    parts = [paths[start : start + _STATES] for start in range(0, len(paths), _STATES)]
    return {path: state for part in pool.map(_states_of, parts) for path, state in part}


def _states_of(paths: Iterable[str]) -> list[tuple[str, FileState | None]]:
    return [(path, FileState.of(path)) for path in paths]
