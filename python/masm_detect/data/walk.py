"""The files below a folder, as every command reads them: links are followed, hidden files and folders are not."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from masm_detect.data.sample import DatasetError, natural_key

#: From this number of paths in one folder on, `absent_files` lists it.
_LISTED = 4


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder` and links to folders, sorted, without hidden ones."""
    return [folder / entry.name for entry in _entries(folder) if _kind(folder, entry) == "folder"]


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, in natural order. A name that starts with a dot hides a file or all below a folder.

    Links to files and folders are followed.

    Raises:
        DatasetError: a link leads to a folder that it is in, a link leads nowhere, or a folder cannot be read.
    """
    return sorted(_walk(folder, (os.path.realpath(folder),)), key=natural_key)


def absent_files(paths: Sequence[str]) -> set[str]:
    """The paths that lead to no file. A folder of several is listed once, which is faster than a look at each file."""
    folders: dict[str, list[str]] = {}
    for path in paths:
        folders.setdefault(os.path.dirname(path), []).append(path)
    absent = set()
    for folder, inside in folders.items():
        there = _file_names(folder) if len(inside) >= _LISTED else set()
        # A name that is not listed may still lead to a file, on a system that ignores case.
        absent.update(p for p in inside if os.path.basename(p) not in there and not os.path.isfile(p))
    return absent


def _file_names(folder: str) -> set[str]:
    """The names of the files, and links to files, in a folder; none if it cannot be read."""
    try:
        with os.scandir(folder or ".") as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError:
        return set()


def left_out(folder: Path, files: Sequence[str]) -> str:
    """The warning about files that are neither image nor video."""
    return f"{folder}: {len(files)} files are not images or videos and were left out: {list(files[:5])}"


def _walk(folder: Path, above: tuple[str, ...]) -> Iterator[Path]:
    for entry in _entries(folder):
        path, kind = folder / entry.name, _kind(folder, entry)
        if kind == "file":
            yield path
        elif kind == "folder":
            real = os.path.realpath(path)
            if entry.is_symlink() and real in above:
                raise DatasetError(f"{path} is a link to {real}, which it is in: remove the link")
            yield from _walk(path, (*above, real))


def _entries(folder: Path) -> list[os.DirEntry]:
    """What is in a folder, by name, without hidden names."""
    try:
        with os.scandir(folder) as found:
            return sorted((e for e in found if not e.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise DatasetError(f"{folder} cannot be read ({error.strerror or error})") from error


def _kind(folder: Path, entry: os.DirEntry) -> str:
    """Either "file", "folder" or "" (a socket, a device). Raises DatasetError for a link that leads nowhere."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
    except OSError as error:  # links in a circle
        raise DatasetError(f"{folder / entry.name} cannot be read ({error.strerror or error})") from error
    if entry.is_symlink():
        target = os.path.realpath(folder / entry.name)
        raise DatasetError(
            f"{folder / entry.name} is a link to {target}, which does not exist: remove or mend the link"
        )
    return ""
