"""Forgery families made by real image operations, each a function of an image and a random generator.

Every family takes an RGB uint8 image [H, W, 3] and returns (forged, mask): the forged image, uint8, same shape, and
where it was changed, uint8 [H, W], 255 = changed. They imitate the steps of deepfake pipelines: paste a face with a
soft edge (`blend`, "self-blended images", Shiohara and Yamasaki, CVPR 2022), clone it in the gradient domain
(`poisson`, Perez et al. 2003), grow pixels in a generator's up-convolutions (`upsample`, Odena et al. 2016; Frank et
al. 2020), fill holes (`inpaint`, Telea 2004), bend a face (`warp`) and fit it to another scale and angle (`resample`,
Popescu and Farid 2005). They are not deepfakes: a score on them shows that a method learns such traces, nothing about
faces.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

Forgery = Callable[[np.ndarray, np.random.Generator], tuple[np.ndarray, np.ndarray]]


def blend(rgb: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Self-blended splice: the same content, recoloured, shifted a little and softer or sharper, under a soft mask."""
    h, w = rgb.shape[:2]
    alpha = _soften(_blob(h, w, rng), rng.uniform(1.0, 3.5))
    gain = 1 + rng.choice([-1, 1], 3) * rng.uniform(0.03, 0.11, 3)
    source = rgb.astype(np.float32) * gain.astype(np.float32) + np.float32(rng.uniform(-10, 10))
    if rng.random() < 0.5:
        source = cv2.GaussianBlur(source, (0, 0), rng.uniform(0.6, 1.2))
    else:
        source += rng.uniform(0.6, 1.4) * (source - cv2.GaussianBlur(source, (0, 0), 1.2))
    shift = rng.choice([-1, 1], 2) * rng.uniform(1.0, 5.0, 2)
    matrix = np.array([[1, 0, shift[0]], [0, 1, shift[1]]], np.float32)
    source = cv2.warpAffine(source, matrix, (w, h), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return _composite(rgb, source, alpha * np.float32(rng.choice([0.75, 1.0])))


def poisson(rgb: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Poisson clone: another place of the picture, mirrored, cloned so that only its gradients are kept."""
    h, w = rgb.shape[:2]
    mask = (_blob(h, w, rng) > 0.5).astype(np.uint8) * 255
    mask[:3], mask[-3:], mask[:, :3], mask[:, -3:] = 0, 0, 0, 0  # seamlessClone needs a border around the patch
    # Mirrored and shifted, the picture reflected at its rim: no seam of its own inside the patch.
    flip = np.array([[-1, 0, w - 1], [0, 1, 0]]) if rng.random() < 0.5 else np.array([[1, 0, 0], [0, -1, h - 1]])
    matrix = flip.astype(np.float32)
    matrix[:, 2] += rng.choice([-1, 1], 2) * rng.uniform(0.1, 0.3, 2) * (w, h)
    donor = cv2.warpAffine(rgb, matrix, (w, h), flags=cv2.INTER_NEAREST, borderMode=cv2.BORDER_REFLECT_101)
    top, left, height, width = _bounding_box(mask)
    centre = (left + width // 2, top + height // 2)
    mode = cv2.NORMAL_CLONE if rng.random() < 0.7 else cv2.MIXED_CLONE
    # A copy: OpenCV 5 writes into the mask that it is given.
    forged = cv2.seamlessClone(donor, rgb, mask.copy(), centre, mode)
    # OpenCV solves over the whole bounding box, so the rim of the patch changes too.
    return forged, mask | (cv2.absdiff(forged, rgb).max(axis=2) > 2).astype(np.uint8) * 255


def upsample(rgb: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Generator-like upsampling: half size, then a 2x transposed convolution or nearest; whole image or a region.

    A transposed convolution of odd kernel size and stride 2 covers its outputs unevenly: the four phases get other
    gains (the checkerboard). The picture is sharpened again, so that softness alone does not give the forgery away.
    """
    h, w = rgb.shape[:2]
    small = cv2.resize(rgb, (w // 2, h // 2), interpolation=cv2.INTER_AREA).astype(np.float32)
    if rng.random() < 0.5:
        grown = np.zeros((h // 2 * 2, w // 2 * 2, 3), np.float32)
        grown[::2, ::2] = small
        imbalance = rng.choice([-1, 1]) * rng.uniform(0.01, 0.03)  # of the phases; their mean gain stays 1
        taps = np.array([0.5 - imbalance / 2, 1 + imbalance, 0.5 - imbalance / 2])
        grown = cv2.filter2D(grown, -1, np.outer(taps, taps).astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    else:
        grown = small.repeat(2, axis=0).repeat(2, axis=1)
        centre = rng.uniform(0.5, 0.9)
        taps = np.array([(1 - centre) / 2, centre, (1 - centre) / 2])
        grown = cv2.filter2D(grown, -1, np.outer(taps, taps).astype(np.float32), borderType=cv2.BORDER_REFLECT_101)
    grown = cv2.copyMakeBorder(grown, 0, h - grown.shape[0], 0, w - grown.shape[1], cv2.BORDER_REPLICATE)
    grown += rng.uniform(0.2, 0.8) * (grown - cv2.GaussianBlur(grown, (0, 0), 1.5))
    if rng.random() < 0.5:
        return _composite(rgb, grown, np.ones((h, w), np.float32))
    return _composite(rgb, grown, _soften(_blob(h, w, rng, 0.30, 0.45), 2.0))


def inpaint(rgb: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Object removal: a few blobs filled from their rim by cv2.inpaint (Telea or Navier-Stokes)."""
    h, w = rgb.shape[:2]
    mask = np.zeros((h, w), np.float32)
    for _ in range(int(rng.integers(2, 5))):
        mask = np.maximum(mask, _blob(h, w, rng, 0.07, 0.15))
    mask = (mask > 0.5).astype(np.uint8) * 255
    algorithm = cv2.INPAINT_TELEA if rng.random() < 0.5 else cv2.INPAINT_NS
    return cv2.inpaint(rgb, mask, float(rng.uniform(2, 5)), algorithm), mask


def warp(rgb: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Local warp: a smooth random displacement of some pixels in a region, bilinear, as reenactment bends a face."""
    h, w = rgb.shape[:2]
    alpha = _soften(_blob(h, w, rng, 0.28, 0.42), 0.05 * min(h, w))
    field = rng.standard_normal((2, h, w)).astype(np.float32)
    sigma = rng.uniform(0.03, 0.06) * min(h, w)
    field = np.stack([cv2.GaussianBlur(f, (0, 0), sigma) for f in field])
    field *= rng.uniform(5, 11) / np.abs(field).max() * alpha
    y, x = np.mgrid[:h, :w].astype(np.float32)
    warped = cv2.remap(rgb, x + field[0], y + field[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
    return warped, (np.hypot(*field) > 0.5).astype(np.uint8) * 255


def resample(rgb: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Resampling: a region enlarged by 1.2-1.9 and turned a little in place, pasted with a narrow soft edge."""
    h, w = rgb.shape[:2]
    shape = _blob(h, w, rng, 0.25, 0.40)
    top, left, height, width = _bounding_box((shape > 0.5).astype(np.uint8))
    centre = (left + width / 2, top + height / 2)
    matrix = cv2.getRotationMatrix2D(centre, rng.uniform(-15, 15), rng.uniform(1.2, 1.9))
    method = cv2.INTER_LINEAR if rng.random() < 0.5 else cv2.INTER_CUBIC
    source = cv2.warpAffine(rgb, matrix, (w, h), flags=method, borderMode=cv2.BORDER_REFLECT_101)
    return _composite(rgb, source.astype(np.float32), _soften(shape, rng.uniform(0.8, 2.0)))


FAMILIES: dict[str, Forgery] = {
    "blend": blend, "poisson": poisson, "upsample": upsample, "inpaint": inpaint, "warp": warp, "resample": resample,
}  # fmt: skip


def forge(name: str, rgb: np.ndarray, rng: np.random.Generator, min_change: float = 3.0, tries: int = 10):
    """One forgery of the family `name`, drawn again until it changes the picture.

    A forgery inside a clear sky changes nothing: its mean absolute change inside the mask must reach `min_change` grey
    levels. After `tries` draws the one of largest change is returned. -> (forged uint8 [H, W, 3], mask uint8 [H, W]).
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown forgery {name!r}; known: {', '.join(FAMILIES)}")
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or min(rgb.shape[:2]) < 64:
        raise ValueError(f"expected an RGB uint8 image of at least 64x64, got shape {rgb.shape}, dtype {rgb.dtype}")
    best, best_change = None, -1.0
    for _ in range(tries):
        forged, mask = FAMILIES[name](rgb, rng)
        inside = mask > 0
        change = float(cv2.absdiff(forged, rgb)[inside].mean()) if inside.any() else 0.0
        if change > best_change:
            best, best_change = (forged, mask), change
        if change >= min_change:
            break
    return best


def _blob(h: int, w: int, rng: np.random.Generator, low: float = 0.20, high: float = 0.34) -> np.ndarray:
    """A random smooth closed shape, float32 [h, w] in {0, 1}; its radius is `low`..`high` of the shorter side."""
    side = min(h, w)
    radius = rng.uniform(low, high) * side
    margin = min(radius * 0.8, 0.45 * side)
    cy, cx = rng.uniform(margin, h - margin), rng.uniform(margin, w - margin)
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    stretch, tilt = rng.uniform(0.7, 1.3), rng.uniform(0, np.pi)
    ripple = sum(rng.normal(0, 0.10 / k) * np.cos(k * angles + rng.uniform(0, 2 * np.pi)) for k in (2, 3, 4, 5))
    r = radius * np.clip(1 + ripple, 0.5, 1.5)
    a, b = r * np.cos(angles) * stretch, r * np.sin(angles) / stretch
    points = np.stack([cx + a * np.cos(tilt) - b * np.sin(tilt), cy + a * np.sin(tilt) + b * np.cos(tilt)], axis=1)
    mask = np.zeros((h, w), np.uint8)
    cv2.fillPoly(mask, [np.rint(points).astype(np.int32)], 1)
    return mask.astype(np.float32)


def _soften(mask: np.ndarray, sigma: float) -> np.ndarray:
    return cv2.GaussianBlur(mask, (0, 0), float(sigma))


def _composite(rgb: np.ndarray, source: np.ndarray, alpha: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """alpha * source + (1 - alpha) * rgb, rounded once; the mask is where alpha > 0.05."""
    mixed = rgb + alpha[..., None] * (source - rgb)
    return np.clip(np.rint(mixed), 0, 255).astype(np.uint8), (alpha > 0.05).astype(np.uint8) * 255


def _bounding_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the non-zero pixels."""
    x, y, width, height = cv2.boundingRect(mask)
    return y, x, height, width
