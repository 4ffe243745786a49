"""The files that a user names: pictures, videos, and folders of them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from masm_detect.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES, DatasetError
from masm_detect.data.walk import files_below, left_out
from masm_detect.errors import UserError


class PredictError(UserError, ValueError):
    """A run that cannot score new files, or a path that is none."""


def find_files(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    """The files that are named, and the pictures and videos below the folders that are named, without repetition.

    Warns of other files in the folders (`left_out_files`).

    Raises:
        PredictError: a path does not exist, or a folder holds no picture and no video.
    """
    found: dict[Path, None] = {}
    for path in _paths(paths):
        if path.is_dir():
            inside, others = _files_below(path)
            if not inside:
                raise PredictError(f"{path} holds no picture and no video ({len(others)} other files)")
            if others:
                warnings.warn(left_out(path, list(map(str, others))), stacklevel=2)
            found |= dict.fromkeys(inside)
        elif path.is_file():
            found[path] = None
        else:
            raise PredictError(f"{path} does not exist: name pictures, videos or folders")
    if not found:
        raise PredictError("nothing to score: name pictures, videos or folders")
    return list(found)


def left_out_files(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    """The files below the folders among `paths` that are, by their suffix, no picture and no video."""
    return [file for path in _paths(paths) if path.is_dir() for file in _files_below(path)[1]]


def _paths(paths: Sequence[str | Path] | str | Path) -> list[Path]:
    return list(map(Path, [paths] if isinstance(paths, (str, Path)) else paths))


def _files_below(folder: Path) -> tuple[list[Path], list[Path]]:
    """Pictures and videos below a folder, and the other files."""
    try:
        files = files_below(folder)
    except DatasetError as error:
        raise PredictError(str(error)) from error
    inside = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    return inside, [file for file in files if file.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
