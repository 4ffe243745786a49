"""Faces: what a detector returns, and how a face is aligned by five points and cut out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np

from masm_detect.errors import UserError

# ArcFace's five points in a 112x112 crop: left eye, right eye, nose, left and right corner of the mouth, "left" in
# the image (insightface, recognition/common/face_align.py; DeepfakeBench, preprocessing/preprocess.py uses the same).
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]], np.float64
)
TEMPLATE_SIDE = 112


class FaceDetectorError(UserError, RuntimeError):
    """The face detector cannot be loaded."""


@dataclass(frozen=True)
class Face:
    """box: (x0, y0, x1, y1) in pixels. points5: float [5, 2], ordered as ARCFACE_TEMPLATE, or None. score in [0, 1]."""

    box: tuple[float, float, float, float]
    points5: np.ndarray | None
    score: float

    @property
    def area(self) -> float:
        """Of the box, in pixels."""
        return max(0.0, self.box[2] - self.box[0]) * max(0.0, self.box[3] - self.box[1])


class FaceDetector(Protocol):
    """A face detector of `masm prepare`; `name` is written into its report."""

    name: str

    def detect(self, rgb: np.ndarray, smallest: int | None = None) -> list[Face]:
        """Faces of an RGB uint8 image [H, W, 3], in any order; an empty list if there is none.

        smallest: side in pixels from which on faces are looked for, to save time (smaller ones may be found, too); None
        or a side below the detector's own: its own.
        """
        ...


def align_crop(rgb: np.ndarray, face: Face, size: int = 256, scale: float = 1.3) -> np.ndarray:
    """The face, turned upright and cut out: RGB uint8 [size, size, 3], as DeepfakeBench's preprocessing does.

    The five points are fitted to the 112 template by a similarity, with a margin of (scale - 1) / 2 on each side.
    Without points the box, made square and `scale` times as large, is cut out upright. Pixels outside the image are
    black.
    """
    if face.points5 is not None:
        margin = (scale - 1) / 2
        target = (ARCFACE_TEMPLATE / TEMPLATE_SIDE + margin) / (1 + 2 * margin) * size
        matrix = fit_similarity(np.asarray(face.points5, np.float64), target)
    else:
        x0, y0, x1, y1 = face.box
        zoom = size / (max(x1 - x0, y1 - y0) * scale)
        matrix = np.array([[zoom, 0, size / 2 - zoom * (x0 + x1) / 2], [0, zoom, size / 2 - zoom * (y0 + y1) / 2]])
    return cv2.warpAffine(rgb, matrix, (size, size), flags=cv2.INTER_LINEAR)


def fit_similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Least-squares rotation, scale and shift from points [n, 2] to points [n, 2] -> matrix [2, 3] (Umeyama, 1991)."""
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    s, t = source - source_mean, target - target_mean
    variance = (s**2).sum()
    if variance == 0:
        raise ValueError("the points of the face coincide: no alignment fits them")
    u, d, vt = np.linalg.svd(t.T @ s)
    sign = np.array([1.0, np.sign(np.linalg.det(u @ vt))])  # a rotation, never a mirror image
    rotation = u @ np.diag(sign) @ vt
    zoom = (d * sign).sum() / variance
    return np.column_stack([zoom * rotation, target_mean - zoom * rotation @ source_mean])
