"""The images of a Hugging Face data set by key: encoded bytes as they are stored, decoded by nothing but `data.decode`.

A key is the `Sample.path` of such an image, "hf:NAME/SPLIT/ROW": NAME is what follows `hf:` in a data path, with the
subset and the column of the images behind a question mark where they are not the default. A key is all that a worker
process needs to find the image.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode

import numpy as np

from masm_detect.data.sample import DatasetError

PREFIX = "hf:"
#: Formats of `datasets` that hold images and are read. None of them runs code of the data set.
FORMATS = ("imagefolder", "parquet", "arrow", "webdataset", "cache")

_LOCK = threading.RLock()


@dataclass(frozen=True)
class Source:
    """A data set: its folder or hub name, its subset (configuration), and the column that holds the images."""

    name: str
    subset: str | None = None
    image: str = "image"

    def __str__(self) -> str:
        options = {"subset": self.subset} if self.subset else {}
        options |= {"image": self.image} if self.image != "image" else {}
        return PREFIX + self.name + ("?" + urlencode(options) if options else "")

    def key(self, split: str, row: int) -> str:
        """The key of the image in `row` of `split`."""
        return f"{self}/{split}/{row:07d}"


def is_key(path: str | Path) -> bool:
    """Whether `path` names an image of a Hugging Face data set, or the data set, and no file."""
    return isinstance(path, str) and path.startswith(PREFIX)


def read_key(key: str) -> bytes:
    """The encoded image of a key. Raises DatasetError if the data set cannot be opened, OSError if a file is absent."""
    images, row = _find(key)
    return images.read(row)


def size_of_key(key: str) -> int:
    """The size of an encoded image in bytes; the image itself is not read. Raises as `read_key`."""
    images, row = _find(key)
    return images.size(row)


def open_source(source: Source) -> dict[str, Any]:
    """Name of a split -> its rows (`datasets.Dataset`), memory-mapped. Downloads a hub data set at its first use.

    Raises:
        DatasetError: the package `datasets` is missing, there is no such data set, or its format holds no images.
    """
    with _LOCK:
        return _open(source.name, source.subset)


def images_of(source: Source, split: str) -> Images:
    """The images of one split."""
    with _LOCK:
        return _images(source, split)


class Images:
    """The column of images of one split: struct {bytes, path}, not decoded."""

    def __init__(self, rows: Any, column: str) -> None:
        import datasets

        rows = rows.select_columns([column]).with_format(None)
        self._rows, self._column = rows.cast_column(column, datasets.Image(decode=False)), column

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, row: int) -> bytes:
        """The encoded image of a row: b"" for a row without one."""
        stored = self._rows[row][self._column]
        if stored is None or (stored["bytes"] is None and not stored["path"]):
            return b""
        return stored["bytes"] if stored["bytes"] is not None else Path(stored["path"]).read_bytes()

    def size(self, row: int) -> int:
        """The size of a row's encoded image in bytes."""
        length = int(self._lengths[row])
        return length if length >= 0 else Path(self.files[row]).stat().st_size

    @property
    def files(self) -> Mapping[int, str]:
        """Row -> path of the images that are files of their own and not in the data set."""
        return self._stored[1]

    @property
    def _lengths(self) -> np.ndarray:
        """Bytes of each stored image, int64 [rows]: 0 without an image, -1 for a file."""
        return self._stored[0]

    @functools.cached_property
    def _stored(self) -> tuple[np.ndarray, dict[int, str]]:
        """`_lengths` and `files`, from one pass over the rows that reads no image."""
        import pyarrow.compute as pc

        lengths, files = np.zeros(len(self), np.int64), {}
        start = 0
        for table in self._rows.with_format("arrow").iter(batch_size=1000):
            column = table[self._column].combine_chunks()
            stored, paths = (pc.struct_field(column, name) for name in ("bytes", "path"))
            found = pc.fill_null(pc.binary_length(stored), -1).to_numpy(zero_copy_only=False).astype(np.int64)
            if (found < 0).any():
                for row, path in enumerate(paths.to_pylist()):
                    if found[row] < 0 and path:
                        files[start + row] = path
                    elif found[row] < 0:
                        found[row] = 0
            lengths[start : start + len(column)] = found
            start += len(column)
        return lengths, files


def _find(key: str) -> tuple[Images, int]:
    """The images that hold a key, and its row."""
    where, split, row = key.rsplit("/", 2)
    return images_of(_source(where), split), int(row)


@functools.lru_cache
def _source(where: str) -> Source:
    """The source that is written as `where`."""
    name, mark, options = where.removeprefix(PREFIX).rpartition("?")
    values = {key: value[0] for key, value in parse_qs(options).items()} if mark else {}
    return Source(name if mark else where.removeprefix(PREFIX), **values)


@functools.lru_cache(maxsize=64)
def _images(source: Source, split: str) -> Images:
    return Images(_open(source.name, source.subset)[split], source.image)


@functools.lru_cache(maxsize=16)
def _open(name: str, subset: str | None) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise DatasetError(
            f"{PREFIX}{name} needs the package datasets: pip install 'masm_ext[datasets]' ({error})"
        ) from error
    try:
        if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(name)  # written by `save_to_disk`
        else:
            kind = type(datasets.load_dataset_builder(name, subset)).__module__.rsplit(".", 1)[-1]
            found = datasets.load_dataset(name, subset) if kind in FORMATS else None
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        part = f" with the subset {subset!r}" if subset else ""
        raise DatasetError(f"{PREFIX}{name} cannot be opened{part}: {error}") from error
    if found is None:
        raise DatasetError(
            f"{PREFIX}{name} is read as {kind!r}, which holds no images: give a data set of images (imagefolder, "
            "parquet, arrow or webdataset)"
        )
    return dict(found) if isinstance(found, dict) else {"all": found}
