"""From a sample to the tensor the backbone sees: decode, normalise, augment, resize or crop, subtract the mean."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import Dataset

from masm_detect.data.records import Sample
from masm_detect.errors import UserError


class UnreadableImage(UserError, OSError):
    """An image file is absent, empty, truncated or no image; the message names it."""


class TransformError(UserError, ValueError):
    """A transform or augmentation that cannot work, in itself or on the image that the message names."""


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. Probabilities are per image, 0: off; ranges are [low, high], drawn uniformly.

    Attributes:
        flip: probability of mirroring left-right
        jpeg: probability of a JPEG recompression
        jpeg_quality: range of its quality, 1 to 100
        blur: probability of a Gaussian blur
        blur_sigma: range of its sigma in pixels
        brightness_contrast: probability of pixels * (1 + c) + 255 b
        brightness_contrast_limit: b and c are drawn from plus and minus this
        noise: probability of Gaussian noise
        noise_sigma: range of its standard deviation, of 0 to 255
        downscale: probability of resizing to less and back
        downscale_factor: range of the factor
    """

    flip: float = 0.5
    jpeg: float = 0.0
    jpeg_quality: tuple[int, int] = (40, 100)
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.4, 2.0)
    brightness_contrast: float = 0.0
    brightness_contrast_limit: float = 0.1
    noise: float = 0.0
    noise_sigma: tuple[float, float] = (1.0, 8.0)
    downscale: float = 0.0
    downscale_factor: tuple[float, float] = (0.5, 0.9)

    def __post_init__(self) -> None:
        for name in ("flip", "jpeg", "blur", "brightness_contrast", "noise", "downscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise TransformError(f"{name} is a probability and must be in [0, 1], got {getattr(self, name)}")
        for name in ("jpeg_quality", "blur_sigma", "noise_sigma", "downscale_factor"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "jpeg_quality" and high > 100):
                limit = "0 < low <= high" + (" <= 100" if name == "jpeg_quality" else "")
                raise TransformError(f"{name} must be (low, high) with {limit}, got {(low, high)}")


@dataclass(frozen=True)
class ImageTransform:
    """How an image becomes a tensor.

    size: output side. mean, std: RGB statistics for pixels in [0, 1]. crop: "resize" (the whole image) or "center" (the
    middle size x size pixels, not resampled). augment: None in validation and test. normalize_first: (side, JPEG
    quality): every image is first resized and recompressed alike, for sets whose classes differ in size or format.
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
        if self.normalize_first is not None:
            side, quality = self.normalize_first
            if side < 1 or not 1 <= quality <= 100:
                raise TransformError(
                    f"normalize_first must be (side >= 1, JPEG quality 1..100), got {self.normalize_first}"
                )


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
    """UnreadableImage for what can be seen to be damaged without decoding it: nothing at all, or an end that lacks."""
    if not data:
        raise UnreadableImage(f"{name} is empty (0 bytes): replace or remove it")
    if _is_truncated(data):
        raise UnreadableImage(
            f"{name} is truncated: it ends before the image does ({len(data)} bytes); replace or remove it"
        )


# TIFF (two byte orders and BigTIFF) and BMP, beside WebP: OpenCV gives half of a damaged one and says nothing.
_BY_PILLOW = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+", b"BM")
_8_BIT = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


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


def read_image(path: str | Path) -> np.ndarray:
    """Image file -> RGB uint8 [H, W, 3]; UnreadableImage names the file."""
    return decode_image(read_bytes(path), str(path))


def read_bytes(path: str | Path) -> bytes:
    """What a file holds; UnreadableImage names it."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UnreadableImage(f"{path} cannot be read ({error.strerror or error})") from error


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


def resize_image(rgb: np.ndarray, size: int) -> np.ndarray:
    """RGB uint8 [H, W, 3] -> [size, size, 3], bicubic with antialiasing (Pillow's, as CLIP's own preprocessing).

    OpenCV's bicubic has no antialiasing: it would fold a source's pixel size into its spectrum.
    """
    if rgb.shape[:2] == (size, size):
        return rgb
    return np.array(Image.fromarray(rgb).resize((size, size), Image.Resampling.BICUBIC))


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
    pixels = torch.from_numpy(np.ascontiguousarray(rgb)).permute(2, 0, 1).float().div_(255)  # [3, size, size]
    mean, std = (torch.tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (transform.mean, transform.std))
    return pixels.sub_(mean).div_(std).contiguous()


def augment_image(rgb: np.ndarray, config: AugmentConfig, rng: np.random.Generator) -> np.ndarray:
    """Random changes of an RGB uint8 image [H, W, 3], same shape; the JPEG comes last, as in the life of a picture."""
    # All coins are tossed first, so that one probability does not shift the draws of another.
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
    return rgb


class FrameDataset(Dataset):
    """Samples as tensors: {"image": float32 [3, size, size], "label": int, "index": int}.

    Augmentation is a function of (seed, epoch, index) only: it does not depend on the number of workers or on the
    order. `images`: encoded images by `Sample.path`, for sets that live in memory. An unreadable image raises
    UnreadableImage; it is never replaced by another one.
    """

    def __init__(self, samples: Sequence[Sample], transform: ImageTransform, seed: int = 0,
                 images: Mapping[str, np.ndarray | bytes] | None = None):  # fmt: skip
        self.samples, self.transform, self.seed, self.images = list(samples), transform, seed, images
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Call before each epoch (before the loader starts its workers): other augmentation in each epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        if self.images is not None and sample.path in self.images:
            rgb = decode_image(self.images[sample.path], sample.path)
        else:
            rgb = read_image(sample.path)
        rng = np.random.default_rng([self.seed, self.epoch, index]) if self.transform.augment is not None else None
        image = transform_image(rgb, self.transform, rng, sample.path)
        return {"image": image, "label": sample.label, "index": index}


def _center_crop(rgb: np.ndarray, size: int, name: str) -> np.ndarray:
    h, w = rgb.shape[:2]
    if h < size or w < size:
        raise TransformError(f'{name} has {w}x{h} pixels, less than the centre crop of {size}: use crop="resize"')
    top, left = (h - size) // 2, (w - size) // 2
    return rgb[top : top + size, left : left + size]


def _is_truncated(data: bytes) -> bool:
    """OpenCV fills the rest of a truncated JPEG or PNG with grey and says nothing; the end markers tell."""
    if data.startswith(b"\xff\xd8\xff"):
        # The end-of-image marker must come after the last start-of-scan: an EXIF thumbnail has an end of its own.
        return data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda")
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return b"IEND" not in data[-4096:]
    return False


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def png_bytes(rgb: np.ndarray) -> bytes:
    """RGB uint8 [H, W, 3] -> PNG file bytes."""
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    return buffer.getvalue()
