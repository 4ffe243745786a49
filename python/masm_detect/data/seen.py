"""What a run was trained on, kept with the run, and compared with a test set later."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masm_detect.data.sample import Sample
from masm_detect.results import read_json, write_json


def write_groups(folder: Path, train: Sequence[Sample], val: Sequence[Sample], train_files: Sequence[str]) -> None:
    """Write `groups.json` to a run folder.

    It holds the names of the training and validation groups, and the fingerprints (`data.contents`) of the training
    files.
    """
    content = {name: sorted({s.group for s in part}) for name, part in (("train", train), ("val", val))}
    write_json(folder / "groups.json", content | {"train_files": sorted(set(train_files))})


def seen_in_training(folder: Path, samples: Sequence[Sample], files: Sequence[str]) -> dict[str, Any] | None:
    """How much of a test set the run in `folder` was trained on.

    Args:
        samples: the test set.
        files: the fingerprints (`data.contents`) of its files, in the same order.

    Returns:
        {"groups": groups of the test set with the name of a training group, "of_groups": all its groups, "samples": its
        samples in such groups, "of_samples": all its samples, "files": its files with the content of a training file,
        or None if the run did not record fingerprints}. None if the folder has no `groups.json`.
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
