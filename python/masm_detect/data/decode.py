"""Image files to RGB arrays and back. A damaged file raises `UnreadableImage`; it is never replaced or half decoded."""

from __future__ import annotations

import io
import os
import re
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from masm_detect.data.hf_images import is_key, read_key, size_of_key
from masm_detect.errors import UserError

# TIFF (two byte orders and BigTIFF) and BMP, like WebP: OpenCV decodes half of a damaged file without an error.
_BY_PILLOW = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")
#: Kinds of an ISO media file (its first box, "ftyp", names one) that are pictures.
_AVIF, _HEIC = (b"avif", b"avis"), (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_PNG = b"\x89PNG\r\n\x1a\n"
#: A JPEG marker: 0xff and a byte that is neither fill (0xff), an escaped 0xff of the data (0), nor a restart marker.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)
#: Modes of Pillow with 8 bits a channel, the only ones that are read.
#: Formats, as Pillow names them, that `decode_image` reads. Pillow knows more of them.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "AVIF", "HEIF")
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class UnreadableImage(UserError, OSError):
    """An image file is absent, empty, truncated or no image; the message names it."""


def read_image(path: str | Path) -> np.ndarray:
    """Image file -> RGB uint8 [H, W, 3]; UnreadableImage names the file."""
    return decode_image(read_bytes(path), str(path))


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file, or of an image of a Hugging Face data set by its key; UnreadableImage names it."""
    try:
        return read_key(path) if is_key(path) else Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read ({error.strerror or error})") from error


def byte_size(path: str | Path) -> int:
    """The number of bytes that `read_bytes` would return; UnreadableImage names the file or key."""
    try:
        return size_of_key(path) if is_key(path) else os.stat(path).st_size
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read ({error.strerror or error})") from error


def decode_image(data: bytes | np.ndarray, name: str) -> np.ndarray:
    """Encoded bytes -> RGB uint8 [H, W, 3]. UnreadableImage if empty, truncated or no image, with `name` in it."""
    data = bytes(data)
    check_whole(data, name)
    kind = data[8:12] if data[4:8] == b"ftyp" else b""
    if kind in _HEIC and not register_heif():
        raise UnreadableImage(f"{name} is a HEIC picture: pip install 'masm_ext[heic]' to read it, or convert it")
    if data.startswith(_BY_PILLOW) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP") or kind in _AVIF + _HEIC:
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
    return _encoded(rgb, ".jpg", options)


def png_bytes(rgb: np.ndarray) -> bytes:
    """RGB uint8 [H, W, 3] -> PNG file bytes."""
    # compression 1 of 9: a face crop gets a tenth larger than at 6, in a quarter of the time
    return _encoded(rgb, ".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]).tobytes()


def _encoded(rgb: np.ndarray, suffix: str, options: list[int]) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> the bytes of an image file, uint8 [n]; `options` as of cv2.imencode."""
    ok, data = cv2.imencode(suffix, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), options)
    if not ok:
        raise ValueError(f"cannot encode an array of shape {rgb.shape}, dtype {rgb.dtype} as {suffix}")
    return data.ravel()


def _decode_by_pillow(data: bytes, name: str) -> np.ndarray:
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        image = ImageOps.exif_transpose(image)  # as OpenCV does it
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error and more on damaged files
        what = str(error).replace("<_io.BytesIO object", "<data").strip()
        raise UnreadableImage(f"{name} is truncated or damaged ({what}; {len(data)} bytes)") from error
    if image.mode not in EIGHT_BIT_MODES:
        raise UnreadableImage(f"{name} has pixels of mode {image.mode}: only 8 bits a channel are read")
    return np.array(image.convert("RGB"))


@lru_cache(maxsize=1)
def register_heif() -> bool:
    """Teach Pillow to read HEIC; whether the package that does is installed."""
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        return False
    register_heif_opener()
    return True


def _is_truncated(data: bytes) -> bool:
    """Whether a JPEG or PNG ends before its image does: OpenCV fills the rest with grey, without an error.

    The image's own segments or chunks decide. What lies behind the end of the image does not matter: phones append a
    video to a photograph, and editors leave a part of the old file behind a cropped screenshot.
    """
    if data.startswith(b"\xff\xd8\xff"):
        return not _jpeg_is_whole(data)
    if data.startswith(_PNG):
        return not _png_is_whole(data)
    return False


def _jpeg_is_whole(data: bytes) -> bool:
    """Whether the segments of a JPEG lead to its end marker."""
    place = 2
    while True:
        found = _JPEG_MARKER.search(data, place)
        if found is None:
            return False
        marker, place = data[found.start() + 1], found.end()
        if marker == 0xD9:  # end of image
            return True
        if marker == 0x01:  # TEM has no segment behind it
            continue
        if marker == 0xD8 or place + 2 > len(data):  # another image starts before this one has ended
            return False
        # Behind a segment comes the next marker; behind the header of a scan its data, in which 0xff is followed by 0
        # or by a restart marker, so that the search above finds the marker that ends it.
        place += int.from_bytes(data[place : place + 2], "big")


def _png_is_whole(data: bytes) -> bool:
    """Whether the chunks of a PNG lead to its last one."""
    place = len(_PNG)
    while place + 12 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        place += 12 + length  # length, kind, data, checksum
        if kind == b"IEND":
            return place <= len(data)
    return False
