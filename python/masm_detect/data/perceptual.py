"""Perceptual hashes: pictures that look alike have hashes that differ in few bits, and such hashes are found quickly.

A hash is the 256-bit pHash of the package ImageHash: the signs of the 16 x 16 lowest frequencies of the grey image,
resized to 64 x 64, against their median. `NEAR` was chosen on face pictures (docs/own-data.md says how).
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import imagehash
import numpy as np
from PIL import Image

#: Bits of a hash.
BITS = 256
#: Hashes that differ in at most this many bits are taken as copies of one picture.
NEAR = 24
#: Side to which a picture is reduced, in pixels.
SIDE = 64
#: A picture whose grey values have a smaller standard deviation (of 0 to 255) shows nothing that a hash could tell.
_FLAT = 3.0
#: A hash is searched by pieces of this many bits.
_PIECE = 16
_PIECES = BITS // _PIECE
#: Pairs compared at a time, which bounds the memory.
_CHUNK = 1 << 20
#: Candidates of a query in one bucket that are compared first: in a cluster of alike pictures one of them is enough.
_FIRST = 64


def perceptual_hash(image: Image.Image) -> bytes:
    """The pHash of a picture, 32 bytes; b"" for a picture of one colour, which has none."""
    small = image.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    if np.asarray(small).std() < _FLAT:
        return b""
    return np.packbits(imagehash.phash(small, hash_size=int(BITS**0.5)).hash).tobytes()


def stack_hashes(hashes: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes that are not empty as uint8 [n, 32], and the places [n] in the list at which they stood."""
    places = np.array([i for i, value in enumerate(hashes) if value], dtype=np.int64)
    joined = b"".join(value for value in hashes if value)
    return np.frombuffer(joined, np.uint8).reshape(len(places), BITS // 8), places


def find_near(
    queries: np.ndarray,
    known: np.ndarray,
    query_groups: np.ndarray | None = None,
    known_groups: np.ndarray | None = None,
    radius: int = NEAR,
) -> np.ndarray:
    """For each query one known hash that differs in at most `radius` bits: its place, or -1 if there is none.

    No pair within `radius` is missed: both hashes are cut into 16 pieces of 16 bits. If the hashes differ in few bits,
    some piece differs in very few (the pigeonhole principle), so that looking up pieces in a table finds all pairs. The
    time grows with the number of hashes and with that of alike pieces, not with the number of pairs.

    Args:
        queries: uint8 [n, 32].
        known: uint8 [m, 32].
        query_groups: int [n]; a query is not compared with known hashes of its own group. None: with all.
        known_groups: int [m]; None if `query_groups` is.
        radius: largest number of bits that differ.

    Returns:
        int64 [n]: places in `known`.
    """
    found = np.full(len(queries), -1, dtype=np.int64)
    if not len(queries) or not len(known):
        return found
    first = _first_of_each(known, known_groups)
    known, known_groups = known[first], None if known_groups is None else known_groups[first]
    query_keys, known_keys = _pieces(queries), _pieces(known)
    for piece, radius_of_piece in _plan(known_keys, radius):
        order = np.argsort(known_keys[piece], kind="stable")
        start = np.searchsorted(known_keys[piece][order], np.arange((1 << _PIECE) + 1))
        for mask in _masks(radius_of_piece):
            for at_first in (True, False):
                open_ = np.flatnonzero(found < 0)
                key = query_keys[piece][open_] ^ mask
                begin, end = start[key.astype(np.int64)], start[key.astype(np.int64) + 1]
                middle = np.minimum(begin + _FIRST, end)
                begin, end = (begin, middle) if at_first else (middle, end)
                for rows, places in _expand(begin, end):
                    rows, places = open_[rows], order[places]
                    if known_groups is not None:
                        other = query_groups[rows] != known_groups[places]
                        rows, places = rows[other], places[other]
                    near = differing_bits(queries[rows], known[places]) <= radius
                    found[rows[near]] = first[places[near]]
    return found


def differing_bits(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The number of bits in which the hashes a and b, uint8 [n, 32] each, differ: int [n]."""
    words = np.ascontiguousarray(a).view(np.uint64) ^ np.ascontiguousarray(b).view(np.uint64)  # [n, 4]
    return np.bitwise_count(words).sum(axis=1, dtype=np.int64)


def _first_of_each(hashes: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    """Places of the first of each hash (in each group): frames of a still video have one hash."""
    groups = np.zeros(len(hashes), dtype=np.int64) if groups is None else groups.astype(np.int64)
    rows = np.ascontiguousarray(np.concatenate([hashes, groups[:, None].view(np.uint8)], axis=1))
    return np.sort(np.unique(rows.view(f"V{rows.shape[1]}").ravel(), return_index=True)[1])


def _pieces(hashes: np.ndarray) -> np.ndarray:
    """The bits of hashes [n, 32], shuffled alike, as 16 pieces: uint16 [16, n].

    Low frequencies of aligned faces resemble each other: shuffling spreads their bits over the pieces.
    """
    shuffle = np.random.default_rng(0).permutation(BITS)
    bits = np.ascontiguousarray(np.unpackbits(hashes, axis=1)[:, shuffle])
    return np.ascontiguousarray(np.packbits(bits, axis=1).view(">u2").T.astype(np.uint16))


def _plan(known_keys: np.ndarray, radius: int) -> list[tuple[int, int]]:
    """(piece, bits in which it may differ): if no piece is so near, the hashes differ in more than `radius` bits.

    With r_i for piece i, they then differ in at least sum(r_i + 1) bits: the sum must be radius + 1. The pieces with
    the most even values get the larger r_i.
    """
    uneven = [np.square(np.bincount(keys, minlength=1 << _PIECE).astype(np.float64)).sum() for keys in known_keys]
    share, rest = divmod(radius + 1, _PIECES)
    plan = [(int(piece), share + (rank < rest) - 1) for rank, piece in enumerate(np.argsort(uneven))]
    return [(piece, bits) for piece, bits in plan if bits >= 0]


def _masks(bits: int) -> list[np.uint16]:
    """All pieces with at most `bits` bits set."""
    chosen = [c for count in range(bits + 1) for c in combinations(range(_PIECE), count)]
    return [np.uint16(sum(1 << bit for bit in bits_set)) for bits_set in chosen]


def _expand(begin: np.ndarray, end: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(row, place) of all places begin[row] to end[row] - 1, about `_CHUNK` at a time."""
    counts = end - begin
    total = np.cumsum(counts)
    cuts = np.unique(np.searchsorted(total, np.arange(0, total[-1] + _CHUNK, _CHUNK) if len(total) else [0]))
    for low, high in zip(cuts, [*cuts[1:], len(counts)]):
        count = counts[low:high]
        if size := int(count.sum()):
            rows = np.repeat(np.arange(low, high), count)
            offset = np.arange(size) - np.repeat(np.cumsum(count) - count, count)
            yield rows, begin[rows] + offset
