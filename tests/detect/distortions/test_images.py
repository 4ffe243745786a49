"""Each distortion of an image against another implementation of what it is named after."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from masm_detect.distortions import images
from masm_detect.distortions.registry import DISTORTIONS, Cell, choose_cells
from PIL import Image, ImageEnhance
from scipy.ndimage import binary_opening, gaussian_filter
from skimage.color import rgb2ycbcr


@pytest.fixture
def random(seed):
    return np.random.default_rng(seed)


@pytest.fixture
def rgb(random):
    """A smooth picture with some noise, 72 x 96: what JPEG and resizing are made for."""
    coarse = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (96, 72), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth + random.normal(0, 4, smooth.shape), 0, 255).astype(np.uint8)


def values(name):
    return list(DISTORTIONS[name].levels.values())


def apply(name, rgb, value, random=None):
    return DISTORTIONS[name].apply(rgb, value, random)


def off(a, b):
    return np.abs(a.astype(int) - b.astype(int))


def pil_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality, subsampling=2)
    return Image.open(file).convert("RGB")


def test_the_levels_are_those_of_deeperforensics():
    assert {one.name: values(one.name) for one in DISTORTIONS.values() if one.suite == "deeperforensics"} == {
        "saturation": [0.4, 0.3, 0.2, 0.1, 0.0],
        "contrast": [0.85, 0.725, 0.6, 0.475, 0.35],
        "blocks": [16, 32, 48, 64, 80],
        "noise": [0.001, 0.002, 0.005, 0.01, 0.05],
        "blur": [7, 9, 13, 17, 21],
        "pixelate": [2, 3, 4, 5, 6],
        "vc": [30, 32, 35, 38, 40],
    }


@pytest.mark.parametrize("value", values("saturation"))
def test_saturation_scales_the_chroma_of_ycbcr(rgb, value):
    made = images.saturation(rgb, value, None)
    expected = rgb2ycbcr(rgb)
    expected[..., 1:] = 128 + (expected[..., 1:] - 128) * value
    found = rgb2ycbcr(made)
    assert np.abs(found - expected).max() < 1  # rounding to 8 bits; less saturated colours are not clipped
    if value == 0:
        assert (made == made[..., :1]).all()


@pytest.mark.parametrize("value", values("contrast"))
def test_contrast_is_the_brightness_of_pillow(rgb, value):
    expected = np.array(ImageEnhance.Brightness(Image.fromarray(rgb)).enhance(value))
    assert off(images.contrast(rgb, value, None), expected).max() <= 1


@pytest.mark.parametrize("value", values("noise")[:4])  # the last is mostly clipped
def test_noise_has_its_variance_in_ycbcr(random, value):
    made = images.noise(np.full((200, 200, 3), 128, np.uint8), value, random)
    deviation = (rgb2ycbcr(made) / 255).std(axis=(0, 1))  # Y, Cb, Cr in video range
    assert deviation == pytest.approx([value**0.5] * 3, rel=0.05)


def test_strong_noise_is_clipped_and_does_not_wrap(random):
    made = images.noise(np.full((64, 64, 3), 250, np.uint8), 0.05, random)
    assert (made == 255).mean() > 0.3


@pytest.mark.parametrize("value", values("blur"))
def test_blur_is_a_gaussian(rgb, value):
    radius = (value - 1) // 2
    planes = [gaussian_filter(rgb[..., c].astype(float), value / 6, mode="mirror", radius=radius) for c in range(3)]
    assert off(images.blur(rgb, value, None), np.rint(np.stack(planes, -1))).max() <= 1


@pytest.mark.parametrize("value", values("pixelate"))
def test_pixelate_is_bilinear_both_ways(rgb, value):
    def bilinear(image, size):
        tensor = torch.from_numpy(image.astype(np.float32)).permute(2, 0, 1)[None]
        made = torch.nn.functional.interpolate(tensor, size, mode="bilinear", align_corners=False)
        return made[0].permute(1, 2, 0).round().clamp(0, 255).numpy().astype(np.uint8)

    height, width = rgb.shape[:2]
    expected = bilinear(bilinear(rgb, (height // value, width // value)), (height, width))
    assert off(images.pixelate(rgb, value, None), expected).max() <= 2


@pytest.mark.parametrize(("height", "width", "count", "side"), [(256, 300, 16, 8), (520, 600, 32, 8), (64, 96, 16, 2)])
def test_blocks_have_their_number_and_size(random, height, width, count, side):
    made = images.blocks(np.zeros((height, width, 3), np.uint8), 16, random)
    grey = (made == 128).all(-1)
    assert ((made == 0).all(-1) | grey).all()
    assert side * side < grey.sum() <= count * side * side
    # where one block lies alone, it is a square of this side: opening by the square leaves all blocks
    assert np.array_equal(binary_opening(np.pad(grey, side), np.ones((side, side)))[side:-side, side:-side], grey)
    # a random place rarely covers another: nearly all of their area is grey
    assert grey.sum() > 0.8 * count * side * side


def test_blocks_cover_the_same_share_of_small_pictures(random):
    shares = []
    for size in (256, 128, 64):
        made = [images.blocks(np.zeros((size, size, 3), np.uint8), 80, random) == 128 for _ in range(8)]
        shares.append(np.mean(made))
    assert max(shares) < 1.15 * min(shares)


@pytest.mark.parametrize("value", values("jpeg"))
def test_jpeg_is_that_of_pillow(rgb, value):
    made = images.jpeg(rgb, value, None)
    assert off(made, np.array(pil_jpeg(Image.fromarray(rgb), value))).max() <= 3
    assert off(made, rgb).max() > 0


def test_resize_keeps_the_size_and_loses_detail(random):
    for value in values("resize"):
        flat = np.full((40, 53, 3), 99, np.uint8)
        assert np.array_equal(images.resize(flat, value, None), flat)
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    made = images.resize(np.stack([board] * 3, -1), 50, None)
    assert made.shape == (64, 64, 3) and made[8:-8, 8:-8].std() < 3 < board.std()


@pytest.mark.parametrize(
    ("shape", "expected"), [((300, 600), (64, 128)), ((90, 128), (90, 128)), ((500, 20), (128, 5))]
)
def test_a_thumbnail_stays_small(random, shape, expected):
    rgb = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
    made = images.thumbnail(rgb, 128, None)
    assert made.shape[:2] == expected
    assert np.array_equal(made, rgb) == (shape == expected)


@pytest.mark.parametrize(("name", "qualities"), [("social", (85, 75)), ("messenger", (60, 60))])
def test_chains_are_resizing_and_jpeg(random, name, qualities):
    coarse = random.integers(0, 256, (9, 12, 3), dtype=np.uint8)
    large = cv2.resize(coarse, (1600, 1200), interpolation=cv2.INTER_CUBIC)
    value = values(name)[0]
    made = apply(name, large, value)
    expected = Image.fromarray(large).resize((value, value * 3 // 4), Image.Resampling.BICUBIC)
    for quality in qualities:
        expected = pil_jpeg(expected, quality)
    assert made.shape == (value * 3 // 4, value, 3)
    assert off(made, np.array(expected)).mean() < 0.5


@pytest.mark.parametrize("cell", [c for c in choose_cells() if not c.video], ids=lambda c: c.name)
def test_every_cell_is_repeatable_and_leaves_the_image_alone(rgb, cell):
    before = rgb.copy()
    first, again = cell.image(rgb, 3, "a/1.png"), cell.image(rgb, 3, "a/1.png")
    assert first.dtype == np.uint8 and first.tobytes() == again.tobytes() and np.array_equal(rgb, before)
    others = cell.image(rgb, 4, "a/1.png"), cell.image(rgb, 3, "a/2.png")
    drawn = cell.distortion is not None and cell.distortion.name in ("noise", "blocks")
    assert all((other.tobytes() != first.tobytes()) == drawn for other in others)


def test_tiny_images_are_distorted_too(random):
    for shape in ((1, 1), (5, 3), (9, 200)):
        rgb = random.integers(0, 256, (*shape, 3), dtype=np.uint8)
        for cell in choose_cells():
            if not cell.video:
                made = cell.image(rgb, 0, "x")
                assert made.ndim == 3 and min(made.shape) >= 1


def test_clean_is_the_image_itself(rgb):
    assert Cell().image(rgb, 0, "x") is rgb and Cell().name == "clean"
