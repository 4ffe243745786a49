"""Reads every file of a data set once: damaged files are found before a run, and copies are recognised later."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
from PIL import Image, ImageOps

from masm_ext.progress import Progress

from .content_cache import Content, ContentCache, FileState
from .decode import EIGHT_BIT_MODES, FORMATS, UnreadableImage, check_whole, decode_image, read_bytes, register_heif
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

    Args:
        samples: the samples; a file that several of them have is read once.
        progress: show a progress bar.

    Raises:
        UnreadableImage: a file is absent, empty, truncated or no image.
    """
    found = {}
    with closing(_read_each([sample.path for sample in samples], progress)) as files:
        for path, content in files:
            if isinstance(content, UnreadableImage):
                raise content
            found[path] = content
    return [found[sample.path] for sample in samples]


def survey(paths: Sequence[str], progress: bool = False) -> list[Content | UnreadableImage]:
    """As `read_contents`, but a file that cannot be read has its error in the list, and the others are read, too."""
    found = dict(_read_each(paths, progress))
    return [found[path] for path in paths]


def _read_each(paths: Sequence[str], progress: bool) -> Iterator[tuple[str, Content | UnreadableImage]]:
    """(path, content or error) of each different path."""
    names = list(dict.fromkeys(paths))
    bar = Progress(total=len(names), unit="file", desc="reading", disable=not progress, leave=False)
    with ThreadPoolExecutor(_THREADS) as pool, ContentCache() as cache, bar:
        for start in range(0, len(names), _SLICE):
            key = {name: os.path.abspath(name) for name in names[start : start + _SLICE]}
            states = _states(pool, list(key.values()))
            known = cache.get(states)
            missing = [name for name in key if key[name] not in known]
            read = dict(zip(missing, pool.map(_read, missing)))
            # A file that changed while it was read is read again by the next run.
            after = _states(pool, [key[name] for name in missing])
            cache.put(
                [
                    (key[name], state, content)
                    for name, content in read.items()
                    if isinstance(content, Content)
                    and (state := states[key[name]]) is not None
                    and state == after[key[name]]
                ]
            )
            bar.update(len(key))
            yield from ((name, read[name] if name in read else known[key[name]]) for name in key)


def describe(data: bytes, name: str) -> Content:
    """The content of an image file from its bytes; UnreadableImage, with `name`, if it is damaged or no image.

    A JPEG is decoded at a fraction of its size only, which is enough for the perceptual hash.
    """
    check_whole(data, name)
    fingerprint = hashlib.blake2b(data, digest_size=8).hexdigest()
    kind, quality = "", None
    if data[4:8] == b"ftyp":
        register_heif()
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            kind = {"MPO": "JPEG", None: ""}.get(image.format, image.format)
            quality = jpeg_quality(image.quantization[0]) if 0 in getattr(image, "quantization", {}) else None
            if image.mode not in EIGHT_BIT_MODES or kind not in FORMATS:
                raise OSError(f"{kind} with pixels of mode {image.mode}")
            image.draft("L", (SIDE, SIDE))
            perceptual = perceptual_hash(ImageOps.exif_transpose(image))
    except Exception:  # Pillow raises OSError, SyntaxError, struct.error and more
        # The reader of training decides: it reads 16-bit PNG, and raises UnreadableImage for what it cannot read.
        rgb = decode_image(data, name)
        height, width = rgb.shape[:2]
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
