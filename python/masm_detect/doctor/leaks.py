"""What leaks: groups and copies in several splits, one picture under two labels, pictures that look alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

from masm_detect.data.content_cache import Content
from masm_detect.data.copies import byte_copies, near_copies
from masm_detect.data.sample import SPLITS, Sample

from .problems import Problem, plural

Pairs = list[tuple[int, int]]


def divided_groups(samples: Sequence[Sample]) -> list[Problem]:
    """Groups that are in several splits."""
    splits: dict[tuple[str, str], set[str]] = defaultdict(set)
    for s in samples:
        splits[s.dataset, s.group].add(s.split)
    found = [f"{group} in {', '.join(sorted(where))}" for (_, group), where in splits.items() if len(where) > 1]
    if not found:
        return []
    text = f"{plural(len(found), 'group')} in several splits (a group: a video, or a picture and its forgeries)"
    return [Problem("error", "leak", text, len(found), found)]


def copied_files(samples: Sequence[Sample], contents: Sequence[Content]) -> tuple[list[Problem], Pairs]:
    """Files of the same bytes: under two labels, in two splits, in two groups of undivided data, or merely twice.

    Also returns all pairs of them.
    """
    found: dict[str, Pairs] = {"label": [], "split": [], "group": [], "twice": []}
    for first, *others in byte_copies(samples, contents):
        for other in others:
            found[_kind_of_copy(samples[first], samples[other])].append((first, other))
    about = (
        ("label", "error", "label", "labelled both real and fake (identical bytes): remove those with the wrong label"),
        ("split", "error", "leak", "in two splits, byte for byte: remove them from one of the splits"),
        ("group", "error", "leak", "in two groups of data without splits, byte for byte: a random split may separate "
         "them; remove one, or give both the same name"),
        ("twice", "warning", "copies", "in the data twice, byte for byte, under one label and in one split: they count "
         "twice"),
    )  # fmt: skip
    problems = [
        Problem(
            level, kind, f"{plural(len(found[name]), 'file')} {text}", len(found[name]), _lines(samples, found[name])
        )
        for name, level, kind, text in about
        if found[name]
    ]
    return problems, [pair for pairs in found.values() for pair in pairs]


def similar_pictures(samples: Sequence[Sample], contents: Sequence[Content]) -> tuple[list[Problem], Pairs]:
    """Pictures of different groups that look alike (`perceptual.NEAR`): in two splits, in two data sets, or undivided.

    Also returns all pairs of them.
    """
    by_split = {split: [i for i, s in enumerate(samples) if s.split == split] for split in SPLITS}
    by_dataset: dict[str, list[int]] = defaultdict(list)
    for i, s in enumerate(samples):
        by_dataset[s.dataset].append(i)
    problems, everything = [], []

    def search(queries: list[int], known: list[int], where: str, across_splits: bool) -> None:
        pairs = near_copies(samples, contents, queries, known)
        if not across_splits:  # pairs of two splits are reported as such
            pairs = [(a, b) for a, b in pairs if _undivided_or_together(samples[a].split, samples[b].split)]
        everything.extend(pairs)
        if pairs:
            mixed = sum(samples[a].label != samples[b].label for a, b in pairs)
            looks = "picture {} looks" if len(pairs) == 1 else "pictures {} look"
            text = f"{len(pairs)} {looks.format(where)} like pictures of another group"
            if mixed:
                text += f"; {mixed} of these are real and fake: if one was made from the other, give both the same name"
            problems.append(Problem("warning", "look-alike", text, len(pairs), _lines(samples, pairs)))

    for earlier, later in combinations(SPLITS, 2):
        search(by_split[later], by_split[earlier], f"of the {later} split, compared with the {earlier} split,", True)
    for one, other in combinations(by_dataset, 2):
        search(by_dataset[other], by_dataset[one], f"of {other}, compared with {one},", False)
    for dataset, places in by_dataset.items():
        undivided = [i for i in places if not samples[i].split]
        search(undivided, undivided, f"of {dataset}, which has no splits,", False)
    return problems, everything


def _kind_of_copy(a: Sample, b: Sample) -> str:
    if a.label != b.label:
        return "label"
    if a.split != b.split:
        return "split"
    return "group" if not a.split and a.group != b.group else "twice"


def _undivided_or_together(a: str, b: str) -> bool:
    return a == b or not a or not b


def _lines(samples: Sequence[Sample], pairs: Pairs) -> list[str]:
    return [f"{samples[a].path} and {samples[b].path}" for a, b in pairs]
