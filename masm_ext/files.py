"""Writing a file so that its name always holds a whole one, old or new."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(path: Path, data: bytes) -> Iterator[Path]:
    """Write to a temporary name of its own beside ``path`` and flush to disk; renamed to ``path`` when the block ends,
    removed if it raises. Yields the temporary path. Safe beside other writers.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary name of its own beside ``path``, flush to disk, rename. Safe beside other writers."""
    with staged(path, data):
        pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other writer holds the lock of ``folder``, and hold it; no file is made.

    Without a lock where the system has none (Windows, some network file systems).
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
