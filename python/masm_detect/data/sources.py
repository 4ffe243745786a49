"""From the data sets that a run names to its training and validation samples, with no group on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from masm_detect.config import ConfigError, DataConfig, HfConfig
from masm_detect.data.checks import check_samples, conflict_of
from masm_detect.data.deepfakebench import read_deepfakebench, read_ungrouped
from masm_detect.data.folders import read_folder
from masm_detect.data.groups import root, with_pair_groups
from masm_detect.data.hf_datasets import read_huggingface
from masm_detect.data.hf_images import is_key
from masm_detect.data.sample import SPLITS, DatasetError, Sample, limit_frames
from masm_detect.data.samples import Samples
from masm_detect.data.self_blended import self_blended
from masm_detect.data.splits import split_by_group


def read_dataset(path: str | Path, *, grouped: bool = True, **options: Any) -> list[Sample]:
    """`read_deepfakebench` for a .json file, `read_folder` for a folder; `options` go to that reader.

    grouped: False leaves out the groups that the names of the videos of a .json file tell.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, **options)
    if path.suffix == ".json":
        return read_deepfakebench(path, **options) if grouped else read_ungrouped(path, **options)
    what = "" if path.exists() else "there is no such file or folder; "
    raise DatasetError(f"{path}: {what}expected a DeepfakeBench .json file or a folder with real/ and fake-<method>/")


def load_samples(
    paths: Sequence[str],
    *,
    splits: Sequence[str] | None = None,
    root: str | None = None,
    prefix_map: dict[str, str] | None = None,
    compression: str | None = None,
    label_map: dict[str, int] | None = None,
    video_pattern: str | None = None,
    missing: str = "error",
    hf: HfConfig | None = None,
) -> list[Sample]:
    """All samples of DeepfakeBench JSON files, `real/`, `fake-*/` folders and Hugging Face data sets.

    Args:
        paths: the files and folders; "hf:FOLDER" or "hf:NAME" for a Hugging Face data set.
        splits: read these splits only; None: all.
        root: for JSON files: the folder of relative frame paths; None: the folder of the file.
        prefix_map: for JSON files: {prefix of a path in the file: prefix here}; the longest match wins.
        compression: for JSON files: "c23", "c40", ... where the file has several; None: the only one.
        label_map: for JSON files and Hugging Face data sets: {label there: 0 (real) or 1 (fake)}.
        video_pattern: for folders: as of `folders.read_folder`.
        missing: for JSON files: "error" raises for a frame that does not exist, "skip" leaves it out with a warning.
        hf: for Hugging Face data sets: which columns to read; None: the defaults.

    Returns:
        The samples: those of JSON files first, each part in the order of the paths.

    Raises:
        ConfigError: no path, a path given twice, or a path without a sample of `splits`.
        DatasetError: two paths hold data sets or videos of one name.
    """
    if not paths:
        raise ConfigError("no data given: name at least one DeepfakeBench JSON file or a folder with real/ and fake-*/")
    options: dict[str, Any] = {
        "root": root,
        "prefix_map": prefix_map,
        "compression": compression,
        "label_map": label_map,
    }
    options = {key: value for key, value in options.items() if value is not None} | {"missing": missing}
    parts: dict[str, list[Sample]] = {}
    for path in map(str, paths):
        if path in parts:
            raise ConfigError(f"the data path {path} is given twice")
        if path.endswith(".json"):
            # The reader skips the other splits, whose frames need not exist.
            part = read_dataset(path, splits=splits, grouped=False, **options)
        else:
            part = (
                read_huggingface(path, hf, label_map)
                if is_key(path)
                else read_dataset(path, video_pattern=video_pattern)
            )
            found = sorted({sample.split for sample in part})
            part = [sample for sample in part if splits is None or sample.split in splits]
            if not part:
                has = (
                    f"this data has {_names(found)}"
                    if any(found)
                    else "its images have none (a folder has splits below train/, val/ and test/): leave the split out"
                )
                raise ConfigError(f"{path}: no sample has the split {_names(splits)}; {has}")
        _refuse_merge(path, part, parts)
        parts[path] = part
    from_json = merge_shared([sample for path, part in parts.items() if path.endswith(".json") for sample in part])
    from_folders = [sample for path, part in parts.items() if not path.endswith(".json") for sample in part]
    return with_pair_groups(from_json) + from_folders


def merge_shared(samples: Sequence[Sample]) -> list[Sample]:
    """Data sets that share files become one, and a file that is listed several times becomes one sample.

    DeepfakeBench's FF-DF.json and FF-F2F.json hold the same real videos: read together, they are the data set
    "FF-DF+FF-F2F", with these reals once and the forgeries of both.

    Raises:
        DatasetError: a file has two labels, is of two forgeries, or is in two splits.
    """
    names = {sample.dataset: None for sample in samples}  # a set in order
    sets: dict[str, str] = {}
    groups: dict[str, str] = {}
    first: dict[str, Sample] = {}
    for sample in samples:
        other = first.setdefault(sample.path, sample)
        if other is not sample:
            if conflict := conflict_of(other, sample):
                raise DatasetError(conflict)
            sets[root(sets, sample.dataset)] = root(sets, other.dataset)
            # groups that the files record, as those of `masm prepare` do
            groups[root(groups, sample.group)] = root(groups, other.group)
    together: dict[str, list[str]] = {}
    for name in names:
        together.setdefault(root(sets, name), []).append(name)
    renamed = {name: "+".join(members) for members in together.values() for name in members}
    kept = [sample for sample in samples if first[sample.path] is sample]
    return [_moved(s, root(groups, s.group), renamed[s.dataset]) for s in kept]


def _moved(sample: Sample, group: str, name: str) -> Sample:
    """`sample` in the group `group` and the data set `name`."""
    if name == sample.dataset:
        return sample if group == sample.group else replace(sample, group=group)
    video = f"{name}/{sample.video.split('/', 1)[1]}"
    own = sample.group == sample.video and group == sample.group
    return replace(sample, dataset=name, video=video, group=video if own else group)


def source_splits(config: DataConfig) -> tuple[Samples, Samples]:
    """(train, validation) samples of a run, as `read_splits`."""
    splits = read_splits(config)
    return splits["train"], splits["val"]


def read_splits(config: DataConfig) -> dict[str, Samples]:
    """The "train", "val" and "test" samples of a run; train and val have both classes each, test may be empty.

    Training uses no image of "test": its files are only compared with those of the other splits (`copies`).

    Raises:
        DatasetError: a group or a file is in two of the three splits, or train or val has one class only.
    """
    samples = load_samples(
        config.paths,
        splits=config.splits,
        root=config.root,
        prefix_map=config.prefix_map,
        compression=config.compression,
        label_map=config.label_map,
        video_pattern=config.video_pattern,
        missing=config.missing,
        hf=config.hf,
    )
    samples = limit_frames(keep_methods(samples, config.methods), config.frames_per_video)
    samples = split_by_group(samples, config.val_fraction, config.split_seed)
    check_samples(samples)
    splits = {name: [sample for sample in samples if sample.split == name] for name in SPLITS}
    for name, title in (("train", "training"), ("val", "validation")):
        try:
            check_samples(splits[name])
        except DatasetError as error:
            raise DatasetError(f"{title} data: {error}") from error
        if config.self_blended:
            splits[name] = self_blended(splits[name])
    return {name: Samples(part) for name, part in splits.items()}


def keep_methods(samples: Sequence[Sample], methods: Sequence[str] | None) -> list[Sample]:
    """Real samples and the fakes of `methods` (None: all). Raises ConfigError for a method that no sample has."""
    if methods is None:
        return list(samples)
    present = sorted({sample.method for sample in samples if sample.label == 1})
    unknown = sorted(set(methods) - set(present))
    if unknown:
        raise ConfigError(f"data.methods names {unknown}, but the data has {present}")
    return [sample for sample in samples if sample.label == 0 or sample.method in methods]


def _names(splits: Sequence[str] | None) -> str:
    return " or ".join(map(repr, splits or ()))


def _frames_of(samples: Sequence[Sample]) -> dict[str, set[str]]:
    frames: dict[str, set[str]] = {}
    for sample in samples:
        frames.setdefault(sample.video, set()).add(sample.path)
    return frames


def _refuse_merge(path: str, part: Sequence[Sample], others: Mapping[str, Sequence[Sample]]) -> None:
    """Raise DatasetError if `path` holds a video, or a folder a data set, of the same name as one of `others`.

    One data set may be divided over several JSON files.
    """
    names, videos = {sample.dataset for sample in part}, _frames_of(part)
    for other, samples in others.items():
        shared = names & {sample.dataset for sample in samples}
        both_json = path.endswith(".json") and other.endswith(".json")
        # one video in two JSON files is the same if its frames are
        theirs = _frames_of(samples)
        twice = [v for v in videos.keys() & theirs.keys() if not (both_json and videos[v] == theirs[v])]
        if twice or (shared and not both_json):
            what = f"the video {min(twice)!r}" if twice else f"the data set {min(shared)!r}"
            raise DatasetError(
                f"{other} and {path} both hold {what}, and would be merged: rename one of them (the name of a folder "
                "is the name of its data set), or give only one of them"
            )
