"""Reads the data sets with the readers of `masm train`, but collects what is wrong instead of stopping there."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masm_detect.config import HfConfig
from masm_detect.data.checks import conflict_of
from masm_detect.data.groups import with_pair_groups
from masm_detect.data.hf_datasets import read_huggingface
from masm_detect.data.hf_images import PREFIX, is_key
from masm_detect.data.sample import DatasetError, Sample
from masm_detect.data.sources import merge_shared, read_dataset
from masm_detect.errors import ConfigError

from .problems import Problem, plural


@dataclass
class Reading:
    """The samples of all data sets, each file once, what is wrong with them, and the readers' warnings."""

    samples: list[Sample] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_all(
    paths: Sequence[str],
    *,
    splits: Sequence[str] | None = None,
    video_pattern: str | None = None,
    hf: HfConfig | None = None,
    **json_options: Any,
) -> Reading:
    """The samples of DeepfakeBench JSON files, folders and Hugging Face data sets.

    Args:
        paths: the files and folders; "hf:FOLDER" or "hf:NAME" for a Hugging Face data set.
        splits: read these splits only; "all" are the samples that are not divided. None: every sample.
        video_pattern: for folders: as of `folders.read_folder`.
        hf: for Hugging Face data sets: which columns to read; None: the defaults.
        json_options: for JSON files: root, prefix_map, compression and label_map, as of
            `deepfakebench.read_ungrouped`; label_map also for Hugging Face data sets.

    Raises:
        ConfigError: no path, or a path given twice.
        DatasetError: a path does not exist, or none of them can be read.
    """
    if not paths:
        raise ConfigError("no data given: name at least one DeepfakeBench JSON file or a folder with real/ and fake-*/")
    for path in paths:
        if list(paths).count(path) > 1:
            raise ConfigError(f"the data path {path} is given twice")
        if not is_key(path) and not Path(path).exists():
            raise DatasetError(f"{path}: there is no such file or folder")
    reading = Reading()
    json_options = {key: value for key, value in json_options.items() if value is not None}
    listed = [path for path in paths if path.endswith(".json")]
    from_json: list[Sample] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for path in listed:
            options = {"grouped": False, "missing": "keep", "splits": splits, **json_options}
            from_json += _try_to_read(reading, read_dataset, path, **options)
        from_json = with_pair_groups(merge_shared(_without_conflicts(from_json, reading)))
        from_folders: list[Sample] = []
        for path in (path for path in paths if path not in listed):
            name = _unique(path, {sample.dataset for sample in [*from_json, *from_folders]}, reading)
            if is_key(path):
                label_map = json_options.get("label_map")
                part = _try_to_read(reading, read_huggingface, path, hf, label_map, dataset=name)
            else:
                part = _try_to_read(reading, read_dataset, path, video_pattern=video_pattern, dataset=name)
            from_folders += [sample for sample in part if splits is None or (sample.split or "all") in splits]
    once = {sample.path: sample for sample in reversed(_without_conflicts([*from_json, *from_folders], reading))}
    reading.samples = list(reversed(once.values()))
    reading.notes += [str(warning.message) for warning in caught]
    if not reading.samples:
        reasons = [problem.message for problem in reading.problems]
        raise DatasetError("; ".join(reasons) or f"no sample has one of the splits {splits}")
    return reading


def _try_to_read(reading: Reading, read: Callable[..., list[Sample]], *arguments: Any, **options: Any) -> list[Sample]:
    """What `read` returns; no samples and one more problem if it cannot read them."""
    try:
        return read(*arguments, **options)
    except DatasetError as error:
        reading.problems.append(Problem("error", "layout", f"a data set cannot be read: {error}"))
        return []


def _without_conflicts(samples: Sequence[Sample], reading: Reading) -> list[Sample]:
    """The samples without those whose file is listed before with another label or split."""
    first: dict[str, Sample] = {}
    kept, conflicts = [], {"label": [], "leak": []}
    for sample in samples:
        other = first.setdefault(sample.path, sample)
        if conflict := conflict_of(other, sample):
            kind = "leak" if (other.label, other.method) == (sample.label, sample.method) else "label"
            conflicts[kind].append(conflict)
        else:
            kept.append(sample)
    for kind, title in (("label", "listed under two labels"), ("leak", "listed in two splits")):
        if found := conflicts[kind]:
            reading.problems.append(Problem("error", kind, f"{plural(len(found), 'file')} {title}", len(found), found))
    return kept


def _unique(path: str, taken: set[str], reading: Reading) -> str:
    """The name of the folder's data set, with a number if another one has it."""
    name = own = Path(path.removeprefix(PREFIX)).resolve().name
    number = 2
    while name in taken:
        name, number = f"{own}-{number}", number + 1
    if name != own:
        reading.notes.append(
            f"{path} is called {name!r} here: two data sets have the same name; masm train stops with an error"
        )
    return name
