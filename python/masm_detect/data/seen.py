"""What a run was trained on, kept with the run, and compared with a test set later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masm_detect.data.content_cache import Content
from masm_detect.data.deepfakebench import COMPRESSIONS
from masm_detect.data.perceptual import find_near, stack_hashes
from masm_detect.data.sample import Sample
from masm_detect.results import read_json, write_json


def write_groups(
    folder: Path, train: Sequence[Sample], val: Sequence[Sample], train_contents: Sequence[Content]
) -> None:
    """Write `groups.json` to a run folder.

    It holds the names of the training and validation groups, the fingerprints and perceptual hashes of the training
    files, and what the training data are (`training_data`). `train_contents`: as `contents.read_contents` of `train`
    returns them.
    """
    content = {name: sorted({s.group for s in part}) for name, part in (("train", train), ("val", val))}
    files = sorted({content.fingerprint for content in train_contents})
    hashes = sorted({content.perceptual.hex() for content in train_contents if content.perceptual})
    content |= {"train_files": files, "train_perceptual": hashes, "train_data": training_data(train)}
    write_json(folder / "groups.json", content)


def training_data(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """What samples are: {data set: {"methods": {forgery method: videos}, "real_videos", "images_per_video": the most
    images of a video, "compression": the levels that are folders of its paths, as in FaceForensics++}}.
    """
    images: dict[tuple[str, str, str], int] = {}
    levels: dict[str, set[str]] = {}
    for sample in samples:
        video = (sample.dataset, sample.method if sample.label else "", sample.video)
        images[video] = images.get(video, 0) + 1
        levels.setdefault(sample.dataset, set()).update(COMPRESSIONS.intersection(sample.path.split("/")))
    found: dict[str, dict[str, Any]] = {}
    for (dataset, method, _), count in sorted(images.items()):
        entry = found.setdefault(dataset, {"methods": {}, "real_videos": 0, "images_per_video": 0})
        entry["images_per_video"] = max(entry["images_per_video"], count)
        if method:
            entry["methods"][method] = entry["methods"].get(method, 0) + 1
        else:
            entry["real_videos"] += 1
    return {name: entry | {"compression": sorted(levels[name])} for name, entry in found.items()}


def seen_in_training(folder: Path, samples: Sequence[Sample], contents: Sequence[Content]) -> dict[str, Any] | None:
    """How much of a test set the run in `folder` was trained on.

    Args:
        folder: the run folder.
        samples: the test set.
        contents: those of its files (`contents.read_contents`), in the same order.

    Returns:
        {"groups": groups of the test set with the name of a training group, "of_groups": all its groups, "samples": its
        samples in such groups, "of_samples": all its samples, "files": its files with the bytes of a training file,
        "near_copies": its other files that look like a training image (`perceptual.NEAR`)}. "files" and "near_copies"
        are None if the run did not record what they need. None if the folder has no `groups.json`.
    """
    path = Path(folder) / "groups.json"
    if not path.is_file():
        return None
    content = read_json(path)
    trained = set(content["train"])
    trained_files = None if content.get("train_files") is None else set(content["train_files"])
    groups = {sample.group for sample in samples}
    return {
        "groups": len(groups & trained),
        "of_groups": len(groups),
        "samples": sum(sample.group in trained for sample in samples),
        "of_samples": len(samples),
        "files": None if trained_files is None else sum(c.fingerprint in trained_files for c in contents),
        "near_copies": _near_copies(content.get("train_perceptual"), trained_files or set(), contents),
    }


def _near_copies(trained: list[str] | None, files: set[str], contents: Sequence[Content]) -> int | None:
    if trained is None:
        return None
    others = [content.perceptual for content in contents if content.fingerprint not in files]
    known, _ = stack_hashes([bytes.fromhex(value) for value in trained])
    return int((find_near(stack_hashes(others)[0], known) >= 0).sum())
