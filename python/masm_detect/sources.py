"""From the data sets that a run names to its training and validation samples, with no group on both sides."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import ConfigError, DataConfig
from .data.images import FrameDataset, ImageTransform
from .data.records import DatasetError, Sample, check_samples, limit_frames, read_dataset
from .models.backbone import Backbone
from .results import read_json, write_json


def load_samples(
    paths: Sequence[str],
    *,
    splits: Sequence[str] | None = None,
    root: str | None = None,
    prefix_map: dict[str, str] | None = None,
    compression: str | None = None,
    label_map: dict[str, int] | None = None,
    missing: str = "error",
) -> list[Sample]:
    """All samples of DeepfakeBench JSON files and `real/`, `fake-*/` folders; of `splits` only (None: all).

    Options that are None are the reader's own. Raises ConfigError for a path without a sample of `splits`, and
    DatasetError where two paths would become one data set by their names.
    """
    if not paths:
        raise ConfigError("no data given: name at least one DeepfakeBench JSON file or a folder with real/ and fake-*/")
    options = {"root": root, "prefix_map": prefix_map, "compression": compression, "label_map": label_map}
    options = {key: value for key, value in options.items() if value is not None} | {"missing": missing}
    parts: dict[str, list[Sample]] = {}
    for path in map(str, paths):
        if path in parts:
            raise ConfigError(f"the data path {path} is given twice")
        if path.endswith(".json"):
            # The reader itself leaves the other splits alone: their frames need not exist.
            part = read_dataset(path, splits=splits, **options)
        else:
            part = read_dataset(path)
            found = sorted({sample.split for sample in part})
            part = [sample for sample in part if splits is None or sample.split in splits]
            if not part:
                has = (
                    f"this data has {_names(found)}"
                    if any(found)
                    else "its images have none, which a folder has below train/, val/ and test/: leave the split out"
                )
                raise ConfigError(f"{path}: no sample has the split {_names(splits)}; {has}")
        _refuse_merge(path, part, parts)
        parts[path] = part
    return [sample for part in parts.values() for sample in part]


def _names(splits: Sequence[str] | None) -> str:
    return " or ".join(map(repr, splits or ()))


def _refuse_merge(path: str, part: Sequence[Sample], others: Mapping[str, Sequence[Sample]]) -> None:
    """Several JSON files may hold one data set, but no video twice; a folder is a data set of its own."""
    names, videos = {sample.dataset for sample in part}, {sample.video for sample in part}
    for other, samples in others.items():
        shared = names & {sample.dataset for sample in samples}
        both_json = path.endswith(".json") and other.endswith(".json")
        twice = videos & {sample.video for sample in samples}
        if twice or (shared and not both_json):
            what = f"the video {min(twice)!r}" if twice else f"the data set {min(shared)!r}"
            raise DatasetError(
                f"{other} and {path} both hold {what}, and would be taken for one: rename one of them (a folder's name "
                "is the name of its data set), or give one of them only"
            )


def source_splits(config: DataConfig) -> tuple[list[Sample], list[Sample]]:
    """(train, validation) samples of a run, both with both classes. Samples of the split "test" are left alone, but no
    group and no file may be in two of the three: DatasetError.
    """
    samples = load_samples(
        config.paths,
        splits=config.splits,
        root=config.root,
        prefix_map=config.prefix_map,
        compression=config.compression,
        label_map=config.label_map,
        missing=config.missing,
    )
    samples = limit_frames(keep_methods(samples, config.methods), config.frames_per_video)
    samples = split_by_group(samples, config.val_fraction, config.split_seed)
    check_samples(samples)
    train = [sample for sample in samples if sample.split == "train"]
    val = [sample for sample in samples if sample.split == "val"]
    for name, part in (("training", train), ("validation", val)):
        try:
            check_samples(part)
        except DatasetError as error:
            raise DatasetError(f"{name} data: {error}") from error
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
                f"the training data hold {len(groups)} {kind} group(s) (videos, pairs of people, photographs); "
                "at least 2 are needed to hold one out for validation. Folders: real/ and fake-<method>/ side by side"
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


def write_groups(folder: Path, train: Sequence[Sample], val: Sequence[Sample], train_files: Sequence[str]) -> None:
    """Write `groups.json` to a run folder: the names of the groups that it trains on and is validated on, and the
    fingerprints (`data.contents`) of the files that it trains on.
    """
    content = {name: sorted({s.group for s in part}) for name, part in (("train", train), ("val", val))}
    write_json(folder / "groups.json", content | {"train_files": sorted(set(train_files))})


def seen_in_training(folder: Path, samples: Sequence[Sample], files: Sequence[str]) -> dict[str, Any] | None:
    """How much of `samples`, whose files have the fingerprints `files`, the run of `folder` was trained on:
    {"groups", "of_groups", "samples", "of_samples", "files"}. Groups, and the samples in them, are told by their names
    (data set/group), `files` (samples; None for a run that did not note it) by what they hold. None if the folder does
    not say (no `groups.json`).
    """
    path = Path(folder) / "groups.json"
    if not path.is_file():
        return None
    content = read_json(path)
    trained, trained_files = set(content["train"]), content.get("train_files")
    groups = {sample.group for sample in samples}
    return {
        "groups": len(groups & trained),
        "of_groups": len(groups),
        "samples": sum(sample.group in trained for sample in samples),
        "of_samples": len(samples),
        "files": None if trained_files is None else sum(map(set(trained_files).__contains__, files)),
    }
