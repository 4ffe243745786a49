"""A data set is a list of `Sample`s: what a sample is, its order on disk, and how many frames of a video are kept."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from masm_detect.errors import UserError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".avif", ".heic", ".heif"})
VIDEO_SUFFIXES = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"})
SPLITS = ("train", "val", "test")


class DatasetError(UserError, ValueError):
    """A data set that cannot be used as it is; the message names what is wrong and where."""


class PrepareError(UserError, ValueError):
    """A source that cannot be prepared: wrong layout or split file, or no face in any image."""


@dataclass(frozen=True)
class Sample:
    """One image.

    Attributes:
        path: the file, or the key of an image in memory
        label: 0 real, 1 fake
        dataset: name of the data set
        method: "real", or the name of the forgery
        video: "dataset/label name/video name", distinct for equal names under other labels or data sets
        split: "train", "val", "test" or "" (not split yet)
        group: samples that stay in one split and are left out together by the jackknife of the intervals; "": the video
    """

    path: str
    label: int
    dataset: str
    method: str
    video: str
    split: str = ""
    group: str = ""

    def __post_init__(self) -> None:
        if self.label not in (0, 1):
            raise DatasetError(f"label must be 0 (real) or 1 (fake), got {self.label!r} for {self.path}")
        if not self.group:
            object.__setattr__(self, "group", self.video)


def natural_key(path: str | Path) -> tuple:
    """Sort key under which frame 10 comes after frame 9."""
    return tuple(
        (0, int(t), "") if t.isdigit() else (1, 0, t) for t in re.split(r"(\d+)", str(path).replace("\\", "/"))
    )


def limit_frames(samples: Sequence[Sample], per_video: int | None) -> list[Sample]:
    """At most `per_video` frames of each video in each split, in the given order; None keeps all.

    They are evenly spread, first and last included.
    """
    if per_video is None:
        return list(samples)
    if per_video < 1:
        raise ValueError(f"per_video must be at least 1, got {per_video}")
    positions: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        positions[s.split, s.video].append(i)
    kept: set[int] = set()
    for indices in positions.values():
        picks = np.linspace(0, len(indices) - 1, min(per_video, len(indices))).round().astype(int)
        kept.update(indices[p] for p in picks)
    return [s for i, s in enumerate(samples) if i in kept]
