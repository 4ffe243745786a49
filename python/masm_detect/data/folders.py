"""Reads a data set from plain folders: `real/` and `fake-<method>/`, optionally below `train/`, `val/` and `test/`."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

from masm_detect.data.groups import with_name_groups
from masm_detect.data.sample import IMAGE_SUFFIXES, SPLITS, VIDEO_SUFFIXES, DatasetError, Sample
from masm_detect.data.walk import files_below, left_out, subfolders


def read_folder(
    path: str | Path, *, dataset: str | None = None, split: str = "", video_pattern: str | None = None
) -> list[Sample]:
    """Samples of a folder with `real/` and `fake-<method>/`, each holding images or one folder of images per video.

    The same layout below `train/`, `val/`, `test/` is read with those splits. Videos (or loose images) of one name in
    several folders form one group, in all splits: a picture and its forgeries belong into one split. Unrelated pictures
    therefore need different names, also in train/ and test/.

    Args:
        dataset: name of the data set; None: that of the folder.
        video_pattern: regex whose group 1 is the name of the video in the stem of a loose image, e.g. r"(.+)_\\d+$" for
            `video_frame.jpg`; None: each loose image is a video.
    """
    path = Path(path)
    if not path.is_dir():
        raise DatasetError(f"{path} is not a folder")
    dataset = dataset or path.resolve().name
    children = subfolders(path)
    if children and all(c.name in SPLITS for c in children):
        nested = [read_folder(c, dataset=dataset, split=c.name, video_pattern=video_pattern) for c in children]
        return with_name_groups([sample for part in nested for sample in part])
    samples: list[Sample] = []
    strangers = [c.name for c in children if c.name != "real" and not c.name.startswith("fake-")]
    if strangers or not children:
        lists = sorted(file.name for file in path.glob("*.json") if file.name not in ("coverage.json", "crops.json"))
        hint = f"; do you mean {path / lists[0]}?" if lists else ": rename or move what is something else"
        raise DatasetError(f"{path}: expected only folders real/ and fake-<method>/, found {strangers or 'none'}{hint}")
    ignored: list[str] = []
    for child in children:
        label, method = (0, "real") if child.name == "real" else (1, child.name.removeprefix("fake-"))
        for file in files_below(child):
            suffix = file.suffix.lower()
            if suffix in VIDEO_SUFFIXES:
                raise DatasetError(f"{file} is a video: run `masm prepare` first to cut the faces out of its frames")
            if suffix not in IMAGE_SUFFIXES:
                ignored.append(str(file))
                continue
            video = file.parent.relative_to(child).as_posix()
            if video == ".":
                video = _video_of(file.stem, video_pattern)
            samples.append(Sample(str(file), label, dataset, method, f"{dataset}/{child.name}/{video}", split))
    if ignored:
        warnings.warn(left_out(path, ignored), stacklevel=2)
    if not samples:
        raise DatasetError(f"{path} holds no image ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return with_name_groups(samples)


def _video_of(stem: str, pattern: str | None) -> str:
    if pattern is None:
        return stem
    try:
        match = re.match(pattern, stem)
    except re.error as error:
        raise DatasetError(f"video_pattern {pattern!r} is not a regular expression: {error}") from error
    if match is not None and not match.re.groups:
        raise DatasetError(f"video_pattern {pattern!r} has no group: put the name of the video into parentheses")
    if not match:
        raise DatasetError(f"video_pattern {pattern!r} does not match the image name {stem!r}")
    return match[1]
