"""Reasons to trust a score less: small, blurred or few faces, heavy compression, images unlike the validation data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from masm_detect.data.crop_recipe import CropRecipe
from masm_detect.data.cutting import Crop
from masm_detect.evaluation.calibration import Calibration

#: A face is enlarged to the crop by more than this factor: most of what the network sees is interpolated.
_ENLARGED = 2.0
#: Variance of the Laplacian of a crop of 256 px, as grey levels of 0 to 255, below which it is called blurred (the
#: measure of Pech-Pacheco et al., ICPR 2000).
_BLURRED = 20.0
#: Estimated JPEG quality, and bits per pixel and frame of a video, below which compression is called heavy.
_JPEG, _BITS = 50, 0.03
#: A detector with a smaller AUC on its validation data is called weak.
_WEAK = 0.7
#: A video of fewer scored frames says little about the rest of it.
_FRAMES = 8


@dataclass(frozen=True)
class Warned:
    """A reason to trust a score less.

    Attributes:
        kind: weak, small, blurred, compressed, few, lost, outside, uncalibrated or as_is
        text: the reason, for people
    """

    kind: str
    text: str


def quality_warnings(
    result: Any,
    crops: Sequence[Crop],
    media: dict[str, Any],
    recipe: CropRecipe | None,
    calibration: Calibration | None = None,
) -> list[Warned]:
    """The warnings for one file.

    Args:
        result: `detector.FileScore`.
        crops: its scored images.
        media: as of `media.media_facts`.
        recipe: how they were cut; None: as they were.
        calibration: of the run; None: it has none.
    """
    found = []
    if result.outside:
        found.append(Warned(
            "outside", "its images are unlike the data that the detector was calibrated on: the score carries no "
            "meaning, and the verdict is unsure",
        ))  # fmt: skip
    if calibration is not None and calibration.auc < _WEAK:
        found.append(Warned(
            "weak", "the detector is weak: of a real and a fake video of its validation data, the fake one scores "
            f"higher in {100 * calibration.auc:.0f} of 100 cases (50: guessing)",
        ))  # fmt: skip
    if result.verdict == "uncalibrated":
        found.append(Warned("uncalibrated", "the run is not calibrated: P(fake) orders files, it is no probability"))
    if recipe is None:
        found.append(Warned("as_is", "the file was taken as a crop like the training images; nothing was cut"))
    scored = len(result.deciding_rows)
    if calibration is not None and scored < calibration.images_per_video[0]:
        lowest, median = calibration.images_per_video
        found.append(Warned(
            "few", f"the score rests on {scored} images; the videos of the validation data have {lowest} or more "
            f"(median {median:g}), so the error rates of the thresholds do not hold for it",
        ))  # fmt: skip
    if recipe is not None and recipe.region == "face":
        sides = [max(c.box[2] - c.box[0], c.box[3] - c.box[1]) * recipe.scale for c in crops if c.box]
        small = sum(recipe.size / side > _ENLARGED for side in sides)
        if small:
            smallest = f"down to {min(sides) / recipe.scale:.0f} pixels"
            text = (
                f"{small} of {len(sides)} faces are small ({smallest}) and were enlarged more than {_ENLARGED:g} times"
            )
            found.append(Warned("small", text))
    part = "tiles" if recipe is not None and recipe.region == "tile" else "images"
    blurred = sum(_sharpness(crop.rgb) < _BLURRED for crop in crops)
    if blurred:
        found.append(Warned("blurred", f"{blurred} of {len(crops)} {part} are blurred, or have no texture"))
    quality, bits = media.get("jpeg_quality"), media.get("bits_per_pixel")
    if quality is not None and quality < _JPEG:
        found.append(Warned("compressed", f"heavy JPEG compression (estimated quality {quality})"))
    if bits is not None and bits < _BITS:
        found.append(Warned("compressed", f"heavy video compression ({bits:.3f} bits per pixel)"))
    if result.kind == "video" and result.scored < _FRAMES:
        found.append(Warned("few", f"only {result.scored} frames were scored"))
    if result.lost:
        found.append(Warned("lost", f"{len(result.lost)} of {result.wanted} frames gave no image to score"))
    return found


def _sharpness(rgb: np.ndarray) -> float:
    """Variance of the Laplacian of an image, brought to 256 px."""
    grey = cv2.resize(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY), (256, 256), interpolation=cv2.INTER_AREA)
    return float(cv2.Laplacian(grey, cv2.CV_64F).var())
