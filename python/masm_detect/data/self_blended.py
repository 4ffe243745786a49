"""Self-blended images: fakes made of the real images alone, as a control and as training data.

A detector trained on them never sees a forgery. Where it does as well as one trained on forgeries, these taught
nothing that blending does not.

Source: Shiohara and Yamasaki, "Detecting Deepfakes with Self-Blended Images", CVPR 2022, arXiv 2204.08376. There the
mask follows the landmarks of the face; here it is a random smooth shape (`forgeries.blend`), which needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .forgeries import forge
from .sample import DatasetError, Sample

#: The method of a self-blended sample; its path is that of the real image.
SELF_BLENDED = "self-blended"
#: The end of its video's name, which tells it from the files of a folder fake-self-blended.
_MARK = "#self-blended"
#: Smallest side of an image that can be blended, in pixels.
SMALLEST = 64


def self_blended(samples: Sequence[Sample]) -> list[Sample]:
    """The real samples, each followed by its self-blended version, of the same group; all other fakes are left out."""
    out = []
    for sample in samples:
        if sample.label == 0:
            out += [sample, replace(sample, label=1, method=SELF_BLENDED, video=sample.video + _MARK)]
    return out


def is_self_blended(sample: Sample) -> bool:
    """Whether the image of a sample has to be blended when it is read."""
    return sample.method == SELF_BLENDED and sample.video.endswith(_MARK)


def blend_with_itself(rgb: np.ndarray, rng: np.random.Generator, name: str = "image") -> np.ndarray:
    """A self-blended version of an image, uint8 [H, W, 3]; DatasetError, with `name`, below 64 x 64 pixels."""
    if min(rgb.shape[:2]) < SMALLEST:
        h, w = rgb.shape[:2]
        raise DatasetError(f"{name} has {w} x {h} pixels: data.self_blended needs at least {SMALLEST} x {SMALLEST}")
    return forge("blend", rgb, rng)[0]
