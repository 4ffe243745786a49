"""Distortions of one image: (RGB uint8 [H, W, 3], value of the level, random generator) -> RGB uint8 [h, w, 3].

The first six are those of DeeperForensics-1.0 (Jiang et al., CVPR 2020, arXiv 2001.03024; the reference code is
`perturbation/distortions.py` of EndlessSora/DeeperForensics-1.0) with its values. They round to the nearest of the 256
levels, where the reference cuts off the fraction.
"""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from masm_detect.data.decode import decode_image, encode_jpeg

#: Luma of RGB, ITU-R BT.601.
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
#: The reference adds its noise to Y, Cb and Cr in video range (219 and 224 of 255 levels) and then expands them.
_LUMA_GAIN, _CHROMA_GAIN = 255 / 219, 255 / 224
#: Cb and Cr to RGB, ITU-R BT.601.
_FROM_CHROMA = np.array([[0, -0.344, 1.773], [1.403, -0.714, 0]], np.float32)
#: Side of a grey block, and the shorter side of the pictures for which the reference chose the number of blocks.
_BLOCK, _NATIVE = 8, 256
_GREY = 128


def saturation(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Chroma times `value` in YCbCr: 0 leaves grey."""
    luma = (rgb @ _LUMA)[..., None]
    return to_uint8(luma + (rgb - luma) * value)


def contrast(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Every pixel times `value`, which darkens: the reference calls it contrast."""
    return to_uint8(rgb * np.float32(value))


def blocks(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Grey blocks of 8 x 8 pixels at random places: `value` times (shorter side // 256).

    In the reference this does nothing to pictures below 256 pixels. Here they get `value` blocks that are smaller in
    proportion (side 8 times shorter side / 256), so that they cover the same share as in a picture of 256 x 256.
    """
    height, width = rgb.shape[:2]
    shorter = min(height, width)
    count = int(value) * max(1, shorter // _NATIVE)
    side = _BLOCK if shorter >= _NATIVE else max(1, round(_BLOCK * shorter / _NATIVE))
    lefts, tops = rng.integers(0, max(1, width - side), count), rng.integers(0, max(1, height - side), count)
    rgb = rgb.copy()
    for top, left in zip(tops, lefts):
        rgb[top : top + side, left : left + side] = _GREY
    return rgb


def noise(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian noise of variance `value` in Y, Cb and Cr in video range, whose white is 1, then clipped."""
    drawn = rng.standard_normal(rgb.shape, dtype=np.float32) * np.float32(255 * np.sqrt(value))
    return to_uint8(rgb + drawn[..., :1] * _LUMA_GAIN + (drawn[..., 1:] * _CHROMA_GAIN) @ _FROM_CHROMA)


def blur(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Gaussian blur with a kernel of `value` pixels and a standard deviation of a sixth of it."""
    size = int(value)
    return cv2.GaussianBlur(rgb, (size, size), size / 6)


def pixelate(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Resize to 1 / `value` and back, bilinear. In the reference its name is JPEG compression, which it is not."""
    height, width = rgb.shape[:2]
    small = cv2.resize(rgb, (max(1, width // int(value)), max(1, height // int(value))))
    return cv2.resize(small, (width, height))


def jpeg(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """JPEG compression of quality `value` (libjpeg's scale), 4:2:0 chroma."""
    return decode_image(encode_jpeg(rgb, int(value)), "an image of the distortion jpeg")


def resize(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Shrink to `value` percent of each side, and enlarge to the old size, bicubic with antialiasing."""
    height, width = rgb.shape[:2]
    return _resized(_resized(rgb, height * value / 100, width * value / 100), height, width)


def thumbnail(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Shrink until the longest side has `value` pixels; the image stays small. Smaller ones do not change."""
    height, width = rgb.shape[:2]
    factor = value / max(height, width)
    return _resized(rgb, height * factor, width * factor) if factor < 1 else rgb


def social(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Posted and posted again: longest side at most `value`, JPEG 85; then once more with JPEG 75.

    The two qualities differ: a second compression with the tables of the first changes almost nothing.
    """
    for quality in (85, 75):
        rgb = jpeg(thumbnail(rgb, value, rng), quality, rng)
    return rgb


def messenger(rgb: np.ndarray, value: float, rng: np.random.Generator) -> np.ndarray:
    """Sent and forwarded in a messenger: longest side at most `value`, JPEG 60, then JPEG 60 again."""
    for _ in range(2):
        rgb = jpeg(thumbnail(rgb, value, rng), 60, rng)
    return rgb


def to_uint8(pixels: np.ndarray) -> np.ndarray:
    """Pixels of any range as uint8: rounded and clipped."""
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _resized(rgb: np.ndarray, height: float, width: float) -> np.ndarray:
    size = max(1, round(width)), max(1, round(height))
    return np.array(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
