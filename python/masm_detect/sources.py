"""From the data sets that a run names to its training and validation samples, with no group on both sides."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from .config import ConfigError, DataConfig
from .data.images import FrameDataset, ImageTransform
from .data.records import Sample, check_samples, read_dataset
from .models.backbone import Backbone


def load_samples(
    paths: Sequence[str],
    *,
    root: str | None = None,
    prefix_map: dict[str, str] | None = None,
    compression: str | None = None,
) -> list[Sample]:
    """All samples of DeepfakeBench JSON files and `real/`, `fake-*/` folders. Options that are None are the reader's
    own.
    """
    if not paths:
        raise ConfigError("no data given: name at least one DeepfakeBench JSON file or a folder with real/ and fake-*/")
    samples = []
    for path in paths:
        options = (
            {"root": root, "prefix_map": prefix_map, "compression": compression} if str(path).endswith(".json") else {}
        )
        samples += read_dataset(path, **{key: value for key, value in options.items() if value is not None})
    return samples


def source_splits(config: DataConfig) -> tuple[list[Sample], list[Sample]]:
    """(train, validation) samples of a run, both with both classes. Samples of the split "test" are left alone."""
    samples = load_samples(config.paths, root=config.root, prefix_map=config.prefix_map, compression=config.compression)
    samples = limit_frames(keep_methods(samples, config.methods), config.frames_per_video)
    samples = split_by_group(samples, config.val_fraction, config.split_seed)
    train = [sample for sample in samples if sample.split == "train"]
    val = [sample for sample in samples if sample.split == "val"]
    check_samples(train)
    check_samples(val)
    return train, val


def keep_methods(samples: Sequence[Sample], methods: Sequence[str] | None) -> list[Sample]:
    """Real samples and the fakes of `methods` (None: all). Raises ConfigError for a method that no sample has."""
    if methods is None:
        return list(samples)
    present = sorted({sample.method for sample in samples if sample.label == 1})
    unknown = sorted(set(methods) - set(present))
    if unknown:
        raise ConfigError(f"data.methods names {unknown}, but the data holds {present}")
    return [sample for sample in samples if sample.label == 0 or sample.method in methods]


def limit_frames(samples: Sequence[Sample], per_video: int | None) -> list[Sample]:
    """At most `per_video` evenly spread frames of each video, in order; None keeps all."""
    if per_video is None:
        return list(samples)
    videos: dict[str, list[int]] = defaultdict(list)
    for index, sample in enumerate(samples):
        videos[sample.video].append(index)
    kept = set()
    for frames in videos.values():
        positions = np.linspace(0, len(frames) - 1, min(per_video, len(frames))).round().astype(int)
        kept.update(frames[position] for position in positions)
    return [sample for index, sample in enumerate(samples) if index in kept]


def split_by_group(samples: Sequence[Sample], val_fraction: float, seed: int) -> list[Sample]:
    """Give samples without a split "train" or "val", whole groups at a time, both classes in both.

    If some sample already is "val", the unsplit ones all become "train". Otherwise `val_fraction` of the groups of
    each class (at least one) go to validation, taken from the unsplit and the "train" samples.
    """
    if any(sample.split == "val" for sample in samples):
        return [replace(sample, split=sample.split or "train") for sample in samples]
    pool = [sample for sample in samples if sample.split in ("", "train")]
    val: set[str] = set()
    random = np.random.default_rng(seed)
    for label in (0, 1):
        groups = sorted({sample.group for sample in pool if sample.label == label})
        if len(groups) < 2:
            kind = "fake" if label else "real"
            raise ConfigError(
                f"{len(groups)} {kind} group(s) in the training data: at least 2 are needed to hold one out"
            )
        wanted = min(len(groups) - 1, max(1, math.floor(val_fraction * len(groups))))
        order = [groups[index] for index in random.permutation(len(groups))]
        # A group of both classes (a photograph and its forgeries) may have been taken for the other class already.
        missing = wanted - len(val.intersection(groups))
        val.update([group for group in order if group not in val][: max(0, missing)])
    return [
        sample
        if sample.split not in ("", "train")
        else replace(sample, split="val" if sample.group in val else "train")
        for sample in samples
    ]


def frame_dataset(
    samples: Sequence[Sample],
    backbone: Backbone,
    data: DataConfig,
    *,
    augment: bool = False,
    seed: int = 0,
    images: Mapping[str, np.ndarray] | None = None,
) -> FrameDataset:
    """The images of `samples` as `backbone` wants them; `augment` only in training. `images`: encoded bytes by path,
    instead of files."""
    transform = ImageTransform(
        size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        crop=data.crop,
        augment=data.augment if augment else None,
        normalize_first=data.normalize_first,
    )
    return FrameDataset(samples, transform, seed=seed, images=images)
