"""From encoded image to tensor: decoding, normalisation, augmentation, bad files."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
from masm_detect.data.images import (
    AugmentConfig,
    FrameDataset,
    ImageTransform,
    UnreadableImage,
    augment_image,
    decode_image,
    encode_jpeg,
    png_bytes,
    read_image,
    transform_image,
)
from masm_detect.data.records import Sample
from masm_detect.errors import UserError
from PIL import Image

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(h=40, w=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def sample(path, label=0):
    return Sample(str(path), label, "d", "m" if label else "real", "d/x/v")


def test_decode_is_rgb_and_exact():
    rgb = picture()
    np.testing.assert_array_equal(decode_image(png_bytes(rgb), "x"), rgb)


@pytest.mark.parametrize("content, message", [
    (b"", "is empty"),
    (b"not an image at all", "not an image"),
    (bytes(encode_jpeg(picture(200, 200), 95))[:3000], "truncated"),
    (png_bytes(picture(100, 100))[:2000], "truncated"),
])  # fmt: skip
def test_bad_file_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    good = tmp_path / "good.png"
    good.write_bytes(png_bytes(picture()))
    dataset = FrameDataset([sample(good), sample(path)], ImageTransform(8, MEAN, STD))
    assert dataset[0]["index"] == 0
    with pytest.raises(UnreadableImage, match=f"bad.jpg.*{message}"):
        dataset[1]


@pytest.mark.parametrize("suffix, options", [
    ("webp", {"lossless": True}), ("webp", {"quality": 90}), ("bmp", {}),
    ("tiff", {}), ("tiff", {"compression": "tiff_lzw"}),
])  # fmt: skip
def test_webp_tiff_and_bmp_are_whole_or_refused(suffix, options):
    rgb = picture(100, 100)
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=suffix, **options)
    data = buffer.getvalue()
    decoded = decode_image(data, "x")
    assert decoded.shape == rgb.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - rgb).mean() < (8 if "quality" in options else 1e-9)
    for kept in (len(data) // 4, len(data) // 2, len(data) * 9 // 10):
        with pytest.raises(UnreadableImage, match="bad is truncated or damaged"):
            decode_image(data[:kept], "bad")


def test_sixteen_bit_tiff_is_refused():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8), np.uint16)).save(buffer, format="tiff")
    with pytest.raises(UnreadableImage, match="8 bits a channel"):
        decode_image(buffer.getvalue(), "deep")


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UnreadableImage, match=r"nothing\.png cannot be read"):
        read_image(tmp_path / "nothing.png")


def test_mean_std_and_center_crop():
    rgb = picture()
    image = transform_image(rgb, ImageTransform(20, MEAN, STD, crop="center"))
    expected = (rgb[10:30, 20:40] / 255 - np.array(MEAN)) / np.array(STD)
    assert image.dtype == torch.float32 and image.is_contiguous()
    np.testing.assert_allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)
    with pytest.raises(ValueError, match='60x40 pixels, less than the centre crop of 50: use crop="resize"'):
        transform_image(rgb, ImageTransform(50, MEAN, STD, crop="center"))


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


def everything():
    return AugmentConfig(flip=0.5, jpeg=0.5, blur=0.5, brightness_contrast=0.5, noise=0.5, downscale=0.5)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    images = {str(i): png_bytes(picture(seed=i)) for i in range(6)}
    samples = [sample(i) for i in images]

    def draw(seed, epoch, order):
        dataset = FrameDataset(samples, ImageTransform(32, MEAN, STD, augment=everything()), seed, images)
        dataset.set_epoch(epoch)
        return {i: dataset[i]["image"] for i in order}

    a, b = draw(0, 3, range(6)), draw(0, 3, reversed(range(6)))
    assert all(torch.equal(a[i], b[i]) for i in a)
    assert not all(torch.equal(a[i], v) for i, v in draw(0, 4, range(6)).items())
    assert not all(torch.equal(a[i], v) for i, v in draw(1, 3, range(6)).items())


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


def test_loader_with_workers():
    images = {str(i): png_bytes(picture(seed=i)) for i in range(4)}
    dataset = FrameDataset([sample(i, int(i) % 2) for i in images], ImageTransform(16, MEAN, STD), images=images)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["label"].tolist() == [0, 1, 0, 1] and batch["index"].tolist() == [0, 1, 2, 3]
