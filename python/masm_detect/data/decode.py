"""Image files to RGB arrays and back. A damaged file raises `UnreadableImage`; it is never replaced or half decoded."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from masm_detect.errors import UserError

# TIFF (two byte orders and BigTIFF) and BMP, like WebP: OpenCV decodes half of a damaged file without an error.
_BY_PILLOW = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")
_8_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class UnreadableImage(UserError, OSError):
    """An image file is absent, empty, truncated or no image; the message names it."""


def read_image(path: str | Path) -> np.ndarray:
    """Image file -> RGB uint8 [H, W, 3]; UnreadableImage names the file."""
    return decode_image(read_bytes(path), str(path))


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file; UnreadableImage names the file."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read ({error.strerror or error})") from error


def decode_image(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """Encoded bytes -> RGB uint8 [H, W, 3]. UnreadableImage if empty, truncated or no image, with `name` in it."""
    data = bytes(data)
    check_whole(data, name)
    if data.startswith(_BY_PILLOW) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP"):
        return _decode_by_pillow(data, name)
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error as error:
        raise UnreadableImage(f"{name} cannot be decoded ({error})") from error
    if bgr is None:
        raise UnreadableImage(f"{name} is not an image that OpenCV can decode ({len(data)} bytes)")
    return cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)


def check_whole(data: bytes, name: str) -> None:
    """Raise UnreadableImage, with `name`, for data that are empty or (JPEG, PNG) truncated. Nothing is decoded."""
    if not data:
        raise UnreadableImage(f"{name} is empty (0 bytes): replace or remove it")
    if _is_truncated(data):
        raise UnreadableImage(
            f"{name} is truncated: it ends before the image does ({len(data)} bytes); replace or remove it"
        )


def encode_jpeg(rgb: np.ndarray, quality: int) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> JPEG bytes, uint8 [n] (4:2:0 chroma, as cameras and hosting sites write)."""
    options = [
        cv2.IMWRITE_JPEG_QUALITY,
        int(quality),
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
        cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420,
    ]
    ok, data = cv2.imencode(".jpg", cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise ValueError(f"cannot encode an array of shape {rgb.shape}, dtype {rgb.dtype} as JPEG")
    return data.ravel()


def png_bytes(rgb: np.ndarray) -> bytes:
    """RGB uint8 [H, W, 3] -> PNG file bytes."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    return buffer.getvalue()


def _decode_by_pillow(data: bytes, name: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)  # as OpenCV does it
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more on damaged files
        raise UnreadableImage(f"{name} is truncated or damaged ({error}; {len(data)} bytes)") from error
    if image.mode not in _8_BIT:
        raise UnreadableImage(f"{name} has pixels of mode {image.mode}: only 8 bits a channel are read")
    return np.array(image.convert("RGB"))


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG has no end marker: OpenCV fills the rest with grey, without an error."""
    if data.startswith(b"\xff\xd8\xff"):
        # After the last start-of-scan: an EXIF thumbnail has an end marker too.
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-4096:]
    return False
