"""From an RGB image to a tensor: resize, crop, normalise, augment."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from masm_detect.config import AugmentConfig
from masm_detect.data.decode import decode_image, encode_jpeg
from masm_detect.data.transforms import ImageTransform, augment_image, transform_image
from masm_detect.errors import UserError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(h=40, w=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def test_mean_std_and_center_crop():
    rgb = picture()
    image = transform_image(rgb, ImageTransform(20, MEAN, STD, crop="center"))
    expected = (rgb[10:30, 20:40] / 255 - np.array(MEAN)) / np.array(STD)
    assert image.dtype == torch.float32 and image.is_contiguous()
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match='60x40 pixels, less than the centre crop of 50: use crop="resize"'):
        transform_image(rgb, ImageTransform(50, MEAN, STD, crop="center"))


def test_every_level_is_that_of_the_formula_in_float32():
    rgb = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)[::-1]
    image = transform_image(rgb, ImageTransform(16, MEAN, STD))
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(image, (torch.from_numpy(rgb.copy()).permute(2, 0, 1).float() / 255 - mean) / std)


def test_resize_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    image = transform_image(stripes, ImageTransform(16, (0, 0, 0), (1, 1, 1)))
    assert (image[:, :, 1:-1] - 0.5).abs().max() < 0.05  # stripes finer than a pixel become grey, not other stripes


def test_normalize_first_makes_sizes_and_formats_alike():
    rgb = cv2.resize(picture(64, 64), (256, 256), interpolation=cv2.INTER_CUBIC)
    transform = ImageTransform(32, MEAN, STD, normalize_first=(64, 90))
    a = transform_image(rgb, transform)
    b = transform_image(decode_image(encode_jpeg(rgb, 60), "x"), transform)
    assert a.shape == b.shape == (3, 32, 32)
    assert (a - b).abs().mean() < 0.1
    with pytest.raises(ValueError, match="JPEG quality"):
        ImageTransform(32, MEAN, STD, normalize_first=(64, 0))


def test_each_augmentation_acts_alone():
    rgb = picture()
    rng = np.random.default_rng
    for name in ("flip", "jpeg", "blur", "brightness_contrast", "noise", "downscale"):
        out = augment_image(rgb, AugmentConfig(**{"flip": 0.0, name: 1.0}), rng(0))
        assert out.shape == rgb.shape and out.dtype == np.uint8 and not np.array_equal(out, rgb), name
    np.testing.assert_array_equal(augment_image(rgb, AugmentConfig(flip=1.0), rng(0)), rgb[:, ::-1])
    np.testing.assert_array_equal(augment_image(rgb, AugmentConfig(flip=0.0), rng(0)), rgb)
    with pytest.raises(ValueError, match="jpeg is a probability"):
        AugmentConfig(jpeg=2)
    for bad in ({"jpeg_quality": (90, 40)}, {"jpeg_quality": (40, 101)}, {"blur_sigma": (0.0, 1.0)}):
        with pytest.raises(UserError, match=next(iter(bad))):
            AugmentConfig(**bad)
