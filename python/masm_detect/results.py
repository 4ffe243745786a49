"""Result files: text and JSON, written atomically."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from masm_ext.files import write_atomically

from .errors import UserError


class ResultError(UserError, ValueError):
    """A result file that cannot be read, or a folder that cannot be written."""


def write_text(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8, atomically; the folder is created if needed.

    A byte of a file name that is not UTF-8, which Python keeps as a lone surrogate, becomes its escape.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode("utf-8", errors="backslashreplace"))


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. A number that is not finite becomes null: JSON has no NaN."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Read a JSON file; raises `ResultError` naming it when it is absent or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not valid JSON (truncated or edited?): {error}") from error


def remove_stale(folder: Path) -> None:
    """Delete the temporary files that a killed writer left in `folder`, which has one writer at a time."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def check_output_folder(path: Path | str) -> None:
    """Raise `ResultError` if `path` cannot become a folder because it, or a part of it, is a file."""
    for part in (Path(path), *Path(path).parents):
        if part.is_file():
            raise ResultError(f"cannot write to the folder {path}: {part} is a file; give another output folder")


def prepare_outputs(paths: Iterable[Path], inputs: Iterable[Path | str] = (), *, overwrite: bool = False) -> None:
    """Check, before long work, that files may be written; the last of `paths` marks the folder as complete.

    With `overwrite` that mark is removed: new files must not stand beside an old one if the work is interrupted.

    Args:
        paths: the files that will be written.
        inputs: files that are read; none of them may be replaced.
        overwrite: existing files may be replaced.

    Raises:
        ResultError: a file exists and `overwrite` is not set, or is an input.
    """
    paths, read = list(paths), {Path(path).resolve() for path in inputs}
    for path in paths:
        if path.resolve() in read:
            raise ResultError(f"{path} is read by this command, and would be replaced by it: give another --out")
        if path.exists() and not overwrite:
            raise ResultError(f"{path} exists already: give another --out, or --overwrite to replace it")
    if paths:
        paths[-1].unlink(missing_ok=True)


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: 0-d arrays become numbers, numbers that are not finite None."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
