"""From an RGB image to the tensor that a backbone takes: augment, resize or crop, subtract the mean."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import cv2
import numpy as np
import torch
from PIL import Image

from masm_detect.config import AugmentConfig
from masm_detect.data.albumentations_pipeline import apply_pipeline, build_pipeline
from masm_detect.data.decode import decode_image, encode_jpeg
from masm_detect.errors import UserError


class TransformError(UserError, ValueError):
    """A transform that cannot work, in itself or on the image that the message names."""


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes a tensor.

    Attributes:
        size: side of the output in pixels
        mean, std: RGB statistics for pixels in [0, 1]
        crop: "resize" (the whole image) or "center" (the middle size x size pixels, not resampled)
        augment: random changes; None in validation and test
        normalize_first: (side, JPEG quality): every image is first resized and recompressed in the same way, for sets
            whose classes differ in size or format; None: not
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop: str = "resize"
    augment: AugmentConfig | None = None
    normalize_first: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.crop not in ("resize", "center"):
            raise TransformError(f'crop must be "resize" or "center", got {self.crop!r}')
        if self.size < 1:
            raise TransformError(f"size must be positive, got {self.size}")
        if self.augment is not None and self.augment.albumentations is not None:
            build_pipeline(self.augment.albumentations)  # raises an error now, not at the first image
        if self.normalize_first is not None:
            side, quality = self.normalize_first
            if side < 1 or not 1 <= quality <= 100:
                raise TransformError(
                    f"normalize_first must be (side >= 1, JPEG quality 1..100), got {self.normalize_first}"
                )


def transform_image(
    rgb: np.ndarray, transform: ImageTransform, rng: np.random.Generator | None = None, name: str = "image"
):
    """RGB uint8 [H, W, 3] -> float32 tensor [3, size, size]. `rng` draws the augmentation, needed if there is one."""
    if transform.normalize_first is not None:
        side, quality = transform.normalize_first
        rgb = decode_image(encode_jpeg(resize_image(rgb, side), quality), name)
    if transform.augment is not None:
        if rng is None:
            raise ValueError("a transform with augmentation needs rng")
        rgb = augment_image(rgb, transform.augment, rng)
    rgb = resize_image(rgb, transform.size) if transform.crop == "resize" else _center_crop(rgb, transform.size, name)
    pixels = np.empty((3, *rgb.shape[:2]), np.float32)
    for channel, values in enumerate(_pixel_values(tuple(transform.mean), tuple(transform.std))):
        np.take(values, rgb[:, :, channel], out=pixels[channel], mode="clip")  # "raise" would copy `out`
    return torch.from_numpy(pixels)


def visible_pixels(pixels: np.ndarray, transform: ImageTransform) -> np.ndarray:
    """The input of a network, float32 [3, size, size], as the image that it shows: RGB uint8 [size, size, 3]."""
    mean, std = (np.array(values, np.float32)[:, None, None] for values in (transform.mean, transform.std))
    return _to_uint8(((pixels * std + mean) * 255).transpose(1, 2, 0))


@functools.lru_cache
def _pixel_values(mean: tuple[float, ...], std: tuple[float, ...]) -> np.ndarray:
    """The normalised value of each level of each channel, float32 [3, 256].

    A table, because torch divides the work on so few pixels among its threads: on a busy machine they waited for each
    other up to ten times as long as the whole image took.
    """
    levels = torch.arange(256, dtype=torch.float32).div_(255)
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1) for v in (mean, std))
    return levels.sub(mean).div_(std).numpy()


def resize_image(rgb: np.ndarray, size: int) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> [size, size, 3], bicubic with antialiasing (Pillow's, as CLIP's own preprocessing).

    OpenCV's bicubic has no antialiasing: the spectrum would depend on the size of the source.
    """
    if rgb.shape[:2] == (size, size):
        return rgb
    return np.array(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))


def augment_image(rgb: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Random changes of an RGB uint8 image [H, W, 3], same shape.

    JPEG comes after the other changes, as in published pictures; transforms of albumentations come last.
    """
    # All decisions are drawn first, so that one probability does not shift the draws of another.
    flip, bright, downscale, blur, noise, jpeg = rng.random(6) < (
        config.flip, config.brightness_contrast, config.downscale, config.blur, config.noise, config.jpeg,
    )  # fmt: skip
    if flip:
        rgb = np.ascontiguousarray(rgb[:, ::-1])
    if bright:
        b, c = rng.uniform(-1, 1, 2) * config.brightness_contrast_limit
        rgb = _to_uint8(rgb.astype(np.float32) * (1 + c) + 255 * b)
    if downscale:
        h, w = rgb.shape[:2]
        factor = rng.uniform(*config.downscale_factor)
        small = cv2.resize(rgb, (max(1, round(w * factor)), max(1, round(h * factor))), interpolation=cv2.INTER_AREA)
        rgb = cv2.resize(small, (w, h), interpolation=cv2.INTER_LINEAR)
    if blur:
        rgb = cv2.GaussianBlur(rgb, (0, 0), rng.uniform(*config.blur_sigma))
    if noise:
        sigma = rng.uniform(*config.noise_sigma)
        rgb = _to_uint8(rgb + rng.standard_normal(rgb.shape, dtype=np.float32) * sigma)
    if jpeg:
        low, high = config.jpeg_quality
        rgb = decode_image(encode_jpeg(rgb, int(rng.integers(low, high + 1))), "augmented image")
    if config.albumentations is not None:
        rgb = apply_pipeline(config.albumentations, rgb, seed=int(rng.integers(2**32)))
    return rgb


def _center_crop(rgb: np.ndarray, size: int, name: str) -> np.ndarray:
    h, w = rgb.shape[:2]
    if h < size or w < size:
        raise TransformError(f'{name} has {w}x{h} pixels, less than the centre crop of {size}: use crop="resize"')
    top, left = (h - size) // 2, (w - size) // 2
    return rgb[top : top + size, left : left + size]


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
