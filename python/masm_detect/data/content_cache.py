"""What was read of image files, kept between runs: a file that has not changed is not read again.

One SQLite file in the user's cache folder, which may be deleted at any time. A row holds for the absolute path, the
size and the time of the last change. A cache that cannot be used costs time only: one warning, and every file is read.
"""

from __future__ import annotations

import os
import sqlite3
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path

from masm_detect.models.bundled import default_cache_dir

#: Paths in one query: older SQLite allows 999 variables.
_SLICE = 500
#: A file that changed less than this long ago, in ns, may change again within the resolution of its time stamp.
_SETTLED = 2_000_000_000
#: Seconds to wait for another process that writes.
_WAIT = 20.0


@dataclass(frozen=True)
class Content:
    """What a file holds.

    Attributes:
        fingerprint: BLAKE2b of its bytes, 16 hex digits
        perceptual: its perceptual hash (`perceptual.perceptual_hash`), 32 bytes; b"": none
        size: its length in bytes
        width: pixels, as stored in the file: before a turn that its EXIF data ask for
        height: pixels
        format: JPEG, PNG, ..., as Pillow names it; "" if Pillow cannot read it
        quality: of a JPEG: the quality, 1 to 100, whose quantization tables are nearest to its own; None: no JPEG
    """

    fingerprint: str
    perceptual: bytes
    size: int
    width: int
    height: int
    format: str
    quality: int | None


@dataclass(frozen=True)
class FileState:
    """Size in bytes and time of the last change, in ns, of a file; `seen_ns`: the clock before it was looked at."""

    size: int
    mtime_ns: int
    seen_ns: int = field(default=0, compare=False)

    @classmethod
    def of(cls, path: str) -> FileState | None:
        """The state of the file at `path`; None if there is none or it cannot be looked at."""
        seen = time.time_ns()
        try:
            stat = os.stat(path)
        except OSError:
            return None
        return cls(stat.st_size, stat.st_mtime_ns, seen)

    def settled(self) -> bool:
        """Whether the file was last changed long enough ago that a later change has another time stamp."""
        return self.seen_ns - self.mtime_ns > _SETTLED


def default_cache_file() -> Path:
    """`$XDG_CACHE_HOME/masm_ext/contents.sqlite`, normally in `~/.cache/masm_ext`."""
    return default_cache_dir() / "contents.sqlite"


class ContentCache:
    """The cache file. Several processes may use it at once.

    Args:
        path: the SQLite file; None: `default_cache_file()`. Its folder is made if needed.
    """

    _COLUMNS = ", ".join(column.name for column in fields(Content))
    _TABLE = "contents_1"  # another number when the meaning of a column changes

    def __init__(self, path: Path | str | None = None) -> None:
        self.path = Path(path) if path is not None else default_cache_file()
        self._database: sqlite3.Connection | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(self.path, timeout=_WAIT)
            # The size of the file is a column of Content.
            with self._database:
                self._database.execute(
                    f"CREATE TABLE IF NOT EXISTS {self._TABLE} "
                    f"(path TEXT PRIMARY KEY, mtime_ns INTEGER, {self._COLUMNS}) WITHOUT ROWID"
                )
        except (sqlite3.Error, OSError) as error:
            self._give_up(error)

    def __enter__(self) -> ContentCache:
        return self

    def __exit__(self, *_: object) -> None:
        if self._database is not None:
            self._database.close()
            self._database = None

    def get(self, states: Mapping[str, FileState | None]) -> dict[str, Content]:
        """{path: content} of the files whose state is the one that was stored; `states` by absolute path."""
        known: dict[str, Content] = {}
        paths = [path for path, state in states.items() if state is not None and _storable(path)]
        for start in range(0, len(paths), _SLICE):
            if self._database is None:
                break
            part = paths[start : start + _SLICE]
            marks = ", ".join("?" * len(part))
            query = f"SELECT path, mtime_ns, {self._COLUMNS} FROM {self._TABLE} WHERE path IN ({marks})"
            try:
                rows = self._database.execute(query, part).fetchall()
            except sqlite3.Error as error:
                self._give_up(error)
                break
            for path, mtime_ns, *values in rows:
                content = Content(*values)
                if states[path] == FileState(content.size, mtime_ns):
                    known[path] = content
        return known

    def put(self, rows: Sequence[tuple[str, FileState, Content]]) -> None:
        """Store (absolute path, state before the file was read, content); files that changed just now are left out."""
        values = [
            (path, state.mtime_ns, *astuple(content))
            for path, state, content in rows
            if state.size == content.size and state.settled() and _storable(path)
        ]
        if self._database is None or not values:
            return
        marks = ", ".join("?" * len(values[0]))
        try:
            with self._database:  # one transaction
                self._database.executemany(
                    f"INSERT OR REPLACE INTO {self._TABLE} (path, mtime_ns, {self._COLUMNS}) VALUES ({marks})", values
                )
        except sqlite3.Error as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self.__exit__()
        warnings.warn(
            f"the cache {self.path} cannot be used ({error}), so that every image is read again: delete the file, or "
            "set XDG_CACHE_HOME to a folder that can be written",
            stacklevel=3,
        )


def _storable(path: str) -> bool:
    """Whether SQLite can hold a path: not if its name is no valid UTF-8."""
    return path.encode("utf-8", "replace").decode("utf-8") == path
