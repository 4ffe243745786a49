"""Reads every file of a data set once: damaged files are found before a run, and copies are recognised later."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from masm_ext.progress import Progress

from .decode import check_whole, read_bytes
from .sample import Sample

#: Files read at a time: disks and networks answer several requests in the time of one.
_THREADS = 8
#: Files given to the threads together.
_SLICE = 1024


def fingerprints(samples: Sequence[Sample], progress: bool = False) -> list[str]:
    """BLAKE2b of each sample's file, 16 hex digits each. No image is decoded.

    Raises UnreadableImage for a file that is absent, empty or, if JPEG or PNG, truncated.
    """
    prints: list[str] = []
    bar = Progress(total=len(samples), unit="file", desc="reading", disable=not progress, leave=False)
    with ThreadPoolExecutor(_THREADS) as pool, bar:
        for start in range(0, len(samples), _SLICE):
            prints += pool.map(_fingerprint, [sample.path for sample in samples[start : start + _SLICE]])
            bar.update(len(prints) - start)
    return prints


def _fingerprint(path: str) -> str:
    data = read_bytes(path)
    check_whole(data, path)
    return hashlib.blake2b(data, digest_size=8).hexdigest()
