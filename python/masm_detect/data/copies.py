"""Copies in a data set, by content and not by name: files of the same bytes, and pictures that look the same."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from .content_cache import Content
from .perceptual import find_near, stack_hashes
from .sample import SPLITS, DatasetError, Sample
from .self_blended import is_self_blended

_LABELS = "real", "fake"


def byte_copies(samples: Sequence[Sample], contents: Sequence[Content]) -> list[list[int]]:
    """The places of samples whose files, of different paths, have the same bytes; each list in order, first ones first.

    Samples of one path count once, and self-blended ones, which are changed when they are read, do not count.
    """
    places: dict[str, dict[str, int]] = defaultdict(dict)
    for i, (sample, content) in enumerate(zip(samples, contents)):
        if not is_self_blended(sample):
            places[content.fingerprint].setdefault(sample.path, i)
    return [list(by_path.values()) for by_path in places.values() if len(by_path) > 1]


def near_copies(
    samples: Sequence[Sample], contents: Sequence[Content], queries: Sequence[int], known: Sequence[int]
) -> list[tuple[int, int]]:
    """(query, known) places of samples of different groups whose pictures look the same, one pair for each such query.

    Files of the same bytes are left out.

    Args:
        samples: all samples.
        contents: those of their files, in the same order.
        queries: places of the samples for which a copy is searched.
        known: places of the samples among which it is searched; may be the same.
    """
    number = {group: i for i, group in enumerate(dict.fromkeys(sample.group for sample in samples))}
    sides = []
    for side in (queries, known):
        hashes, where = stack_hashes([contents[i].perceptual for i in side])
        places = np.asarray(side, dtype=np.int64)[where]
        sides.append((hashes, places, np.array([number[samples[i].group] for i in places], dtype=np.int64)))
    (query_hashes, query_places, query_groups), (known_hashes, known_places, known_groups) = sides
    found = find_near(query_hashes, known_hashes, query_groups, known_groups)
    pairs = [(int(query_places[i]), int(known_places[found[i]])) for i in np.flatnonzero(found >= 0)]
    return [(a, b) for a, b in pairs if contents[a].fingerprint != contents[b].fingerprint]


def check_contents(samples: Sequence[Sample], contents: Sequence[Content]) -> None:
    """Compare the files of a divided data set by what they hold, as `checks.check_samples` does by their names.

    Warns of files that are there twice in one split, and of pictures that look like one of another split
    (`perceptual.NEAR`).

    Args:
        samples: samples with splits.
        contents: those of their files (`contents.read_contents`), in the same order.

    Raises:
        DatasetError: files of the same bytes are real and fake, or are in two splits.
    """
    pairs_of: dict[str, list[tuple[int, int]]] = {"label": [], "split": [], "twice": []}
    for places in byte_copies(samples, contents):
        # an undivided set beside a test split is tested, too: "" is no other split
        first = next((place for place in places if samples[place].split), places[0])
        for other in (place for place in places if place != first):
            a, b = samples[first], samples[other]
            apart = b.split and a.split != b.split
            kind = "label" if a.label != b.label else "split" if apart else "twice"
            pairs_of[kind].append((first, other))
    for kind in ("label", "split"):
        if pairs_of[kind]:
            raise DatasetError(conflict_text(kind, samples, pairs_of[kind]))
    if pairs_of["twice"]:
        a, b = (samples[i].path for i in pairs_of["twice"][0])
        warnings.warn(
            f"{len(pairs_of['twice'])} files are copies, byte for byte, of another file that is used in the same way, "
            f"e.g. {b} of {a}: they count twice",
            stacklevel=2,
        )
    by_split = {split: [i for i, s in enumerate(samples) if s.split == split] for split in SPLITS}
    for earlier, later in combinations([split for split in SPLITS if by_split[split]], 2):
        if pairs := near_copies(samples, contents, by_split[later], by_split[earlier]):
            warnings.warn(near_text(samples, pairs, f"the {later} split", f"the {earlier} split"), stacklevel=2)


def conflict_text(kind: str, samples: Sequence[Sample], pairs: Sequence[tuple[int, int]]) -> str:
    """The message about files of the same bytes with another label ("label") or in another split ("split")."""
    a, b = (samples[i] for i in pairs[0])
    count = f"{len(pairs)} files are" if len(pairs) > 1 else "a file is"
    if kind == "label":
        return (
            f"{count} labelled both real and fake (identical bytes): {a.path} is {_LABELS[a.label]} and {b.path} is "
            f"{_LABELS[b.label]}: "
            "remove the wrong one (`masm doctor` lists all)"
        )
    return (
        f"{count} in two splits, byte for byte: {a.path} is in {a.split or '(none)'!r} and {b.path} in "
        f"{b.split or '(none)'!r}: the detector would be tested on what it has seen. Remove one of them; in "
        "plain folders that are not divided yet, the same name for both keeps them in one split (`masm doctor` lists "
        "all)"
    )


def near_text(samples: Sequence[Sample], pairs: Sequence[tuple[int, int]], queries: str, known: str) -> str:
    """The message about pictures that look the same; `queries` and `known` name the two parts of the data."""
    a, b = (samples[i] for i in pairs[0])
    mixed = sum(samples[i].label != samples[j].label for i, j in pairs)
    kinds = f" ({mixed} of them a real picture and a fake)" if mixed else ""
    looks = "picture of {} looks" if len(pairs) == 1 else "pictures of {} look"
    return (
        f"{len(pairs)} {looks.format(queries)} like pictures of {known} in another group{kinds}, e.g. {a.path} like "
        f"{b.path}: probably copies of another size or compression, or a forgery and its original (`masm doctor` lists "
        "all)"
    )
