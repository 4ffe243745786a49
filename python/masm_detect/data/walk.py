"""The files below a folder, as every command reads them: links are followed, hidden files and folders are not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from masm_detect.data.sample import DatasetError, natural_key


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder` and links to folders, sorted, without hidden ones."""
    return sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, in natural order. A name that starts with a dot hides a file or all below a folder.

    Links to files and folders are followed.

    Raises:
        DatasetError: a link leads to a folder that it is in, or a link leads nowhere.
    """
    return sorted(_walk(folder, (os.path.realpath(folder),)), key=natural_key)


def left_out(folder: Path, files: Sequence[str]) -> str:
    """The warning about files that are neither image nor video."""
    return f"{folder}: {len(files)} files are not images or videos and were left out: {list(files[:5])}"


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    with os.scandir(folder) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    for entry in entries:
        path = folder / entry.name
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            real = os.path.realpath(path)
            if entry.is_symlink() and real in above:
                raise DatasetError(f"{path} is a link to {real}, which it is in: remove the link")
            yield from _walk(path, (*above, real))
        elif entry.is_file():
            yield path
        elif entry.is_symlink():
            target = os.path.realpath(path)
            raise DatasetError(f"{path} is a link to {target}, which does not exist: remove or mend the link")
