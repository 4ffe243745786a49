"""Image files to RGB; damaged files are named."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from masm_detect.data import decode
from masm_detect.data.decode import UnreadableImage, decode_image, encode_jpeg, png_bytes, read_image
from masm_detect.data.frames import FrameDataset
from masm_detect.data.sample import Sample
from masm_detect.data.transforms import ImageTransform
from PIL import Image, features


def picture(h=40, w=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


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


def encoded_heif(rgb, kind):
    if kind == "HEIF":
        pytest.importorskip("pillow_heif", reason="the extra heic is not installed").register_heif_opener()
    elif not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format=kind, quality=95)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["AVIF", "HEIF"])
def test_avif_and_heic_are_whole_or_refused(kind):
    rgb = picture(96, 128)
    data = encoded_heif(rgb, kind)
    assert np.abs(decode_image(data, "x").astype(int) - rgb).mean() < 3
    assert decode_image(data + b"trailer" * 100, "x").shape == rgb.shape
    for share in (0.3, 0.6, 0.95):
        with pytest.raises(UnreadableImage, match=r"a\.avif is truncated or damaged"):
            decode_image(data[: int(share * len(data))], "a.avif")


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setattr(decode, "register_heif", lambda: False)
    with pytest.raises(UnreadableImage, match=r"x is a HEIC picture: pip install 'masm_ext\[heic\]'"):
        decode_image(b"\0\0\0\x18ftypheic" + bytes(100), "x")


def test_sixteen_bits_alpha_palette_and_cmyk():
    """What other programs show: the high bits, without alpha."""
    rgb = picture()
    png = cv2.imencode(".png", rgb[..., ::-1].astype(np.uint16) * 257)[1].tobytes()
    np.testing.assert_array_equal(decode_image(png, "x"), rgb)
    for mode in ("RGBA", "P", "L"):
        buffer = io.BytesIO()
        image = Image.fromarray(rgb).convert(mode)
        image.save(buffer, format="png")
        np.testing.assert_array_equal(decode_image(buffer.getvalue(), "x"), np.array(image.convert("RGB")))
    buffer = io.BytesIO()
    Image.fromarray(rgb).convert("CMYK").save(buffer, format="jpeg", quality=95)
    assert np.abs(decode_image(buffer.getvalue(), "x").astype(int) - rgb).mean() < 4
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(buffer, format="tiff")
    with pytest.raises(UnreadableImage, match="only 8 bits a channel"):
        decode_image(buffer.getvalue(), "x")


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


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture(64, 48)).save(buffer, format=kind, **options)
    return buffer.getvalue()


def with_thumbnail() -> bytes:
    """A JPEG with another one, end marker and all, in its EXIF segment."""
    whole, small = encoded("JPEG"), encoded("JPEG", quality=30)
    segment = b"Exif\0\0" + small
    return whole[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + whole[2:]


WHOLE = {
    "baseline": encoded("JPEG", quality=95),
    "progressive": encoded("JPEG", quality=80, progressive=True),
    "restart markers": encoded("JPEG", restart_marker_blocks=1),
    "thumbnail": with_thumbnail(),
    "png": encoded("PNG"),
}
TRAILERS = {
    "zeros": bytes(5000),
    "start of a video": b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 4,
    "another jpeg": encoded("JPEG"),
    "half a jpeg": encoded("JPEG")[:400],
    "tail of a png": encoded("PNG")[-300:],
}


@pytest.mark.parametrize("trailer", TRAILERS.values(), ids=TRAILERS)
@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_what_lies_behind_an_image_does_not_matter(data, trailer):
    np.testing.assert_array_equal(decode_image(data + trailer, "x"), decode_image(data, "x"))


@pytest.mark.parametrize("data", WHOLE.values(), ids=WHOLE)
def test_every_cut_is_found_also_with_something_behind_it(data):
    # 13: before IEND, the last chunk of a PNG, which holds no pixel
    for kept in np.linspace(20, len(data) - 13, 60).astype(int):
        # inside a header the length of its segment would lead into the next image
        in_scan = kept > data.rfind(b"\xff\xda") + 20 > 20
        for rest in (b"", bytes(2000), *([TRAILERS["another jpeg"]] if in_scan else ())):
            with pytest.raises(UnreadableImage, match="x"):
                decode_image(data[:kept] + rest, "x")
