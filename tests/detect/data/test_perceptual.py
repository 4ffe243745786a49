"""Copies of a picture have near hashes, other pictures have not; near hashes are found without comparing all pairs."""

from __future__ import annotations

import io
from itertools import product

import numpy as np
import pytest
from masm_detect.data import perceptual
from masm_detect.data.contents import describe
from masm_detect.data.perceptual import BITS, NEAR, differing_bits, find_near, stack_hashes
from pictures import picture
from PIL import Image


@pytest.fixture
def random(seed):
    return np.random.default_rng(seed)


def hash_of(image: Image.Image, quality: int | None = None) -> np.ndarray:
    data = io.BytesIO()
    image.save(data, "PNG") if quality is None else image.save(data, "JPEG", quality=quality)
    return stack_hashes([describe(data.getvalue(), "x").perceptual])[0]


def random_hashes(random: np.random.Generator, count: int) -> np.ndarray:
    return random.integers(0, 256, (count, BITS // 8), dtype=np.uint8)


def flipped(random: np.random.Generator, hashes: np.ndarray, counts: list[int]) -> np.ndarray:
    """Copies of the hashes in which `counts` bits differ."""
    bits = np.unpackbits(hashes, axis=1)
    for row, count in zip(bits, counts):
        row[random.choice(BITS, count, replace=False)] ^= 1
    return np.packbits(bits, axis=1)


def test_copies_are_near_and_other_pictures_are_not(seed):
    one, other = picture(seed, 512), picture(seed + 1, 512)
    original = hash_of(one)
    for side, quality in product((512, 256, 128), (95, 75, 50, 30)):
        copy = hash_of(one.resize((side, side), Image.Resampling.BICUBIC), quality)
        assert differing_bits(original, copy)[0] <= NEAR, (side, quality)
        assert differing_bits(original, hash_of(other, quality))[0] > NEAR


def test_a_turned_photograph_is_hashed_as_it_is_shown(seed):
    image = picture(seed)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn
    stored = io.BytesIO()
    image.rotate(90).save(stored, "JPEG", exif=exif, quality=95)
    turned = stack_hashes([describe(stored.getvalue(), "x").perceptual])[0]
    assert differing_bits(turned, hash_of(image))[0] <= NEAR


def test_pictures_of_one_colour_have_no_hash(random):
    grey = np.full((64, 64, 3), 90) + random.normal(0, 1, (64, 64, 3))
    data = io.BytesIO()
    Image.fromarray(grey.astype(np.uint8)).save(data, "JPEG")
    assert describe(data.getvalue(), "x").perceptual == b""
    hashes, places = stack_hashes([b"", b"a" * 32, b"", b"b" * 32])
    assert hashes.shape == (2, 32) and places.tolist() == [1, 3]
    assert stack_hashes([])[0].shape == (0, 32)


@pytest.mark.parametrize("radius", [0, 3, 15, 24, 31, 40])
def test_finds_all_that_is_near_and_nothing_else(random, radius, monkeypatch):
    monkeypatch.setattr(perceptual, "_CHUNK", 1000)
    known = random_hashes(random, 300)
    counts = random.integers(max(0, radius - 4), radius + 5, 300).tolist()
    queries = flipped(random, known, counts)
    found = find_near(queries, known, radius=radius)
    assert found.tolist() == [i if count <= radius else -1 for i, count in enumerate(counts)]
    for empty in (find_near(queries, known[:0]), find_near(queries[:0], known)):
        assert (empty == -1).all()


def test_its_own_group_is_not_compared(random):
    base = random_hashes(random, 200)
    near = flipped(random, base, [2] * 200)  # of the same group
    far = flipped(random, base[:50], [NEAR] * 50)  # of another group
    known, groups = np.concatenate([near, far]), np.concatenate([np.arange(200), np.full(50, 999)])
    found = find_near(base, known, np.arange(200), groups)
    assert found[:50].tolist() == list(range(200, 250)) and (found[50:] == -1).all()


def test_the_cost_does_not_grow_with_the_pairs(random, monkeypatch):
    """Random hashes, and clusters of similar pictures (frames of a still video): the search finds each picture."""
    compared = []
    count = perceptual.differing_bits
    monkeypatch.setattr(perceptual, "differing_bits", lambda a, b: compared.append(len(a)) or count(a, b))
    n = 20_000
    queries, known = random_hashes(random, n), random_hashes(random, n)
    known[:100] = flipped(random, queries[:100], [NEAR] * 100)
    found = find_near(queries, known)
    assert (found >= 0).sum() == 100 and found[:100].tolist() == list(range(100))
    assert sum(compared) < 0.01 * n * n
    compared.clear()
    cluster = flipped(random, random_hashes(random, 1).repeat(4000, axis=0), [3] * 4000)
    assert (find_near(cluster[:2000], cluster[2000:]) >= 0).all()
    assert sum(compared) < 0.1 * 2000 * 2000
