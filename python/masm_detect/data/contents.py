"""What the files of a data set hold, read once: damaged ones are found before a run, and a copy is known again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tqdm import tqdm

from .images import check_whole, read_bytes
from .records import Sample

#: Files that are read at once: disks and networks answer several requests in the time of one.
_THREADS = 8
#: Files that are handed to the threads together.
_SLICE = 1024


def fingerprints(samples: Sequence[Sample], progress: bool = False) -> list[str]:
    """16 hex digits of BLAKE2b over the bytes of each sample's file. UnreadableImage for a file that is absent, empty
    or (JPEG and PNG) ends too early; nothing is decoded.
    """
    prints: list[str] = []
    bar = tqdm(total=len(samples), unit="file", desc="reading", disable=not progress, leave=False)
    with ThreadPoolExecutor(_THREADS) as pool, bar:
        for start in range(0, len(samples), _SLICE):
            prints += pool.map(_fingerprint, [sample.path for sample in samples[start : start + _SLICE]])
            bar.update(len(prints) - start)
    return prints


def _fingerprint(path: str) -> str:
    data = read_bytes(path)
    check_whole(data, path)
    return hashlib.blake2b(data, digest_size=8).hexdigest()
