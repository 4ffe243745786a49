"""Atomic writes: a file name always holds one complete file, old or new."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def staged(path: Path, data: bytes) -> Iterator[Path]:
    """Write to a unique temporary name beside ``path`` and flush to disk; rename it to ``path`` when the block ends,
    remove it if the block raises. Yields the temporary path. Safe beside other writers.
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
    """Write to a unique temporary name beside ``path``, flush to disk, rename. Safe beside other writers."""
    with staged(path, data):
        pass


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of ``folder``, without a lock file; waits for another holder.

    Does nothing on systems without such locks (Windows, some network file systems).
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
