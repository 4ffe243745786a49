"""Checks of a data set before it is used: both classes, no image twice, no group in two splits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from masm_detect.data.sample import DatasetError, Sample

_LEAK_HELP = (
    "the detector would be tested on what it has seen. Published DeepfakeBench files often repeat the test videos as "
    "val: then read only the "
    "splits that you need (splits=[\"train\"], masm train: --data.splits='[train]', which holds out "
    "data.val_fraction of its groups; masm eval: --split test). In plain folders one name means one picture: give "
    "other pictures other names"
)


def conflict_of(a: Sample, b: Sample) -> str | None:
    """What is wrong with two samples of one file: another label, or another split; None if they agree."""
    if a.label != b.label:
        names = "real", "fake"
        return f"{a.path} is {names[a.label]} in {a.video!r} and {names[b.label]} in {b.video!r}: remove the wrong one"
    if a.label == 1 and a.method != b.method:
        return f"{a.path} is a {a.method!r} in {a.video!r} and a {b.method!r} in {b.video!r}: remove the wrong one"
    if a.split != b.split:
        places = " and ".join(f"{s.split or '(none)'!r} (as {s.video!r})" for s in (a, b))
        return f"{a.path} is in the splits {places}: {_LEAK_HELP}"
    return None


def check_samples(samples: Sequence[Sample], need_both_classes: bool = True) -> None:
    """Raise DatasetError for an empty set, one class only, an image twice, or an image or a group in several splits."""
    if not samples:
        raise DatasetError("the data set is empty")
    labels = {s.label for s in samples}
    if need_both_classes and len(labels) == 1:
        only = "fake" if labels == {1} else "real"
        raise DatasetError(f"all {len(samples)} samples are {only}: both classes are needed")
    seen: dict[str, Sample] = {}
    splits_of: dict[tuple[str, str], set[str]] = defaultdict(set)
    for s in samples:
        first = seen.setdefault(s.path, s)
        if first is not s:
            if conflict := conflict_of(first, s):
                raise DatasetError(conflict)
            raise DatasetError(f"{s.path} appears twice in split {s.split or '(none)'!r}")
        splits_of[s.dataset, s.group].add(s.split)
    leaks = [(group, sorted(splits)) for (_, group), splits in splits_of.items() if len(splits) > 1]
    if leaks:
        group, where = leaks[0]
        raise DatasetError(f"{len(leaks)} groups are in more than one split, e.g. {group!r} in {where}: {_LEAK_HELP}")
