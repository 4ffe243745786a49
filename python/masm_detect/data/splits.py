"""Training, validation and test splits that keep every group whole: drawn by shares, or read from a table."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from masm_detect.config import ConfigError
from masm_detect.data.groups import original_ids, with_name_groups
from masm_detect.data.sample import SPLITS, PrepareError, Sample


def split_by_group(samples: Sequence[Sample], val_fraction: float, seed: int) -> list[Sample]:
    """Assign "train" or "val" to the samples without a split, whole groups at a time, with both classes in each.

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
                "at least 2 are needed, one for training and one for validation: add data. A folder of images needs "
                "real/ and fake-<method>/ beside each other"
            )
        count = min(len(groups) - 1, max(1, math.floor(val_fraction * len(groups))))
        order = [groups[index] for index in random.permutation(len(groups))]
        # A group of both classes (a photograph and its forgeries) may already be in `val` for the other class.
        missing = count - len(val.intersection(groups))
        val.update([group for group in order if group not in val][: max(0, missing)])
    return [
        sample
        if sample.split not in ("", "train")
        else replace(sample, split="val" if sample.group in val else "train")
        for sample in samples
    ]


def assign_splits(dataset: str, keys: Sequence[str], splits, seed: int = 0) -> dict[str, str]:
    """Split of every video key ("real/000", "fake-Deepfakes/000_003"), by whole groups; `splits` as in `prepare`."""
    if splits is None:
        return dict.fromkeys(keys, "")
    samples = with_name_groups(
        [Sample(k, int(not k.startswith("real/")), dataset, k.split("/")[0], f"{dataset}/{k}") for k in keys]
    )
    groups = {s.path: s.group for s in samples}
    if isinstance(splits, str) and re.fullmatch(r"[\d.]+(,[\d.]+)*", splits):
        splits = [float(share) for share in splits.split(",")]
    elif isinstance(splits, (str, os.PathLike)):
        splits = _read_split_file(Path(splits))
    if isinstance(splits, Mapping):
        return _splits_by_name(groups, splits)
    return _splits_by_share(groups, splits, seed)


def _read_split_file(path: Path) -> dict:
    try:
        table = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise PrepareError(f"cannot read the split file {path} ({error})") from error
    if not isinstance(table, dict):
        raise PrepareError(f'{path}: expected {{"train": [...], "val": [...], "test": [...]}}')
    return table


def _splits_by_name(groups: dict[str, str], table: Mapping[str, Sequence]) -> dict[str, str]:
    unknown = set(table) - set(SPLITS)
    if unknown:
        raise PrepareError(f"split names must be among {', '.join(SPLITS)}, got {sorted(unknown)}")
    split_of_id: dict[str, str] = {}
    for split, entries in table.items():
        for name in (str(n) for entry in entries for n in (entry if isinstance(entry, (list, tuple)) else [entry])):
            if split_of_id.setdefault(name, split) != split:
                raise PrepareError(f"{name!r} is in two splits, {split_of_id[name]} and {split}")
    result, used = {}, set()
    for key in groups:
        name = key.split("/", 1)[1]
        names = {n for n in (key, name, *original_ids(name)) if n in split_of_id}
        used |= names
        splits = {split_of_id[n] for n in names}
        if len(splits) != 1:
            raise PrepareError(
                f"{key} is in {'no split' if not splits else f'the splits {sorted(splits)}'} of the split file"
            )
        result[key] = splits.pop()
    _refuse_leak(groups, result)
    if unused := sorted(set(split_of_id) - used):
        warnings.warn(f"{len(unused)} names in the split file match no video, e.g. {unused[0]!r}", stacklevel=4)
    return result


def _splits_by_share(groups: dict[str, str], shares: Sequence[float], seed: int) -> dict[str, str]:
    shares = [float(s) for s in shares]
    if len(shares) != 3 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
        raise PrepareError(f"splits as shares must be three numbers (train, val, test) that sum to 1, got {shares}")
    names = sorted(set(groups.values()))
    used = [i for i in range(3) if shares[i] > 0]
    if len(names) < len(used):
        raise PrepareError(f"{len(names)} groups cannot fill {len(used)} splits: each split needs a group of its own")
    counts = {i: 1 for i in used}  # no split stays empty; the rest goes where most is missing
    while sum(counts.values()) < len(names):
        counts[max(used, key=lambda i: shares[i] * len(names) - counts[i])] += 1
    order = np.random.default_rng(seed).permutation(names).tolist()
    plan = [SPLITS[i] for i in used for _ in range(counts[i])]
    split_of_group = dict(zip(order, plan))
    return {key: split_of_group[group] for key, group in groups.items()}


def _refuse_leak(groups: dict[str, str], result: dict[str, str]) -> None:
    seen: dict[str, str] = {}
    for key, group in groups.items():
        if seen.setdefault(group, result[key]) != result[key]:
            raise PrepareError(
                f"group {group!r} (originals and their fakes) is in two splits, {seen[group]} and {result[key]}: "
                "put all its videos into one split of the split file"
            )
