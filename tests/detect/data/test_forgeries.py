"""Each forgery family on a real photograph: what it returns, that it is reproducible, and that it changes the
picture.
"""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.demo_set import load_photograph
from masm_detect.data.forgeries import FAMILIES, forge

PHOTOGRAPH = load_photograph("skimage", "data/coffee.png")[:224, 150:374]


def test_at_least_six_families():
    assert set(FAMILIES) >= {"blend", "poisson", "upsample", "inpaint", "warp", "resample"}


@pytest.mark.parametrize("name", FAMILIES)
def test_family(name):
    original = PHOTOGRAPH.copy()
    for seed in range(8):
        forged, mask = forge(name, original, np.random.default_rng(seed))
        assert forged.shape == original.shape and forged.dtype == np.uint8
        assert mask.shape == original.shape[:2] and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
        again, _ = forge(name, original, np.random.default_rng(seed))
        np.testing.assert_array_equal(forged, again)
        difference = np.abs(forged.astype(int) - original).max(axis=2)
        assert difference[mask > 0].mean() >= 3
        # Outside the mask the picture is (all but) untouched.
        if (mask == 0).any():
            assert difference[mask == 0].mean() < 1.0
    np.testing.assert_array_equal(original, PHOTOGRAPH)  # the input is never written to


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(64, 64), (97, 131), (224, 160)])
def test_odd_sizes(name, shape):
    crop = np.ascontiguousarray(PHOTOGRAPH[: shape[0], : shape[1]])
    for seed in range(5):
        forged, mask = forge(name, crop, np.random.default_rng(seed))
        assert forged.shape == crop.shape and mask.shape == shape


@pytest.mark.parametrize("name", FAMILIES)
def test_flat_image_ends(name):
    """Where nothing can be changed visibly (a clear sky), drawing again stops."""
    flat = np.full((96, 96, 3), 128, np.uint8)
    forged, _ = forge(name, flat, np.random.default_rng(0), tries=3)
    assert forged.shape == flat.shape


def grid_traces(rgb):
    """(mean second difference of even minus odd rows, in grey levels; log ratio of even and odd row steps)."""
    grey = rgb.mean(axis=2)
    bend = grey[1:-1] - (grey[:-2] + grey[2:]) / 2
    step = np.abs(np.diff(grey, axis=0))
    return abs(bend[::2].mean() - bend[1::2].mean()), abs(np.log(step[::2].mean() / step[1::2].mean()))


def test_upsample_leaves_a_grid():
    """The trace of a generator's up-convolution: phases of other gain (transposed) or rows in pairs (nearest)."""
    assert grid_traces(PHOTOGRAPH)[0] < 0.1 and grid_traces(PHOTOGRAPH)[1] < 0.03
    kinds = set()
    for seed in range(12):
        checkerboard, pairs = grid_traces(forge("upsample", PHOTOGRAPH, np.random.default_rng(seed))[0])
        kinds.add(
            "transposed" if checkerboard > 0.5 else "nearest" if pairs > 0.06 else f"none: {checkerboard}, {pairs}"
        )
    assert kinds == {"transposed", "nearest"}


def test_bad_input():
    with pytest.raises(ValueError, match="unknown forgery 'swap'; known: blend"):
        forge("swap", PHOTOGRAPH, np.random.default_rng(0))
    for bad in (PHOTOGRAPH[..., 0], PHOTOGRAPH.astype(np.float32), PHOTOGRAPH[:32]):
        with pytest.raises(ValueError, match="expected an RGB uint8 image of at least 64x64"):
            forge("blend", bad, np.random.default_rng(0))
