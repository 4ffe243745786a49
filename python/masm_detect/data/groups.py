"""Groups of samples that must never be divided between training and test: fakes with their originals.

The name of a video often says which originals it was made from. `NAMING_RULES` holds one rule for each convention; a
new data set needs one function and one line there.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from masm_detect.data.sample import Sample

#: Maps the name of a video to the ids of the originals in it: () if the name does not follow the convention.
NamingRule = Callable[[str], tuple[str, ...]]
# FaceForensics++: a fake is named target_source, its original target; both ids of a pair appear in both roles.
_PAIR_NAME = re.compile(r"^(\d{3})_(\d{3})$")


def target_source(name: str) -> tuple[str, ...]:
    """FaceForensics++: a fake is named target_source ("000_003"), its originals are the real videos 000 and 003."""
    pair = _PAIR_NAME.match(name)
    return pair.groups() if pair else ()


#: Rule of each convention; the first one that yields ids is used.
NAMING_RULES: dict[str, NamingRule] = {
    "FaceForensics++": target_source,
}


def original_ids(name: str) -> tuple[str, ...]:
    """Ids of the originals of the video called `name`, by the first rule that knows the name; () if none does."""
    return next((ids for rule in NAMING_RULES.values() if (ids := rule(name))), ())


def with_pair_groups(samples: list[Sample]) -> list[Sample]:
    """FaceForensics++: real `a`, real `b` and the fakes `a_b`, `b_a` of every method form one group."""
    parent: dict[str, str] = {}
    find = partial(_root, parent)
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    for s in samples:
        if s.label == 1 and (pair := _PAIR_NAME.match(names[s.video])):
            parent[find(f"{s.dataset}/{max(pair.groups())}")] = find(f"{s.dataset}/{min(pair.groups())}")
    if not parent:
        return samples
    members = defaultdict(list)
    for key in sorted(parent):
        members[find(key)].append(key.rsplit("/", 1)[-1])

    def group(s: Sample) -> str:
        pair = _PAIR_NAME.match(names[s.video])
        key = f"{s.dataset}/{pair[1] if pair else names[s.video]}"
        return f"{s.dataset}/pair/{'_'.join(members[find(key)])}" if key in parent else s.group

    return [replace(s, group=group(s)) if s.group == s.video else s for s in samples]


def with_name_groups(samples: list[Sample]) -> list[Sample]:
    """`with_pair_groups`, and then one group for all groups that share a video name under several labels."""
    samples = with_pair_groups(samples)
    parent: dict[str, str] = {}
    find = partial(_root, parent)
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    first: dict[tuple[str, str], str] = {}
    for s in samples:
        one, other = find(first.setdefault((s.dataset, names[s.video]), s.group)), find(s.group)
        parent[max(one, other)] = min(one, other)
    sizes = Counter(find(group) for group in parent)
    label = {}
    for s in samples:
        root = find(s.group)
        label.setdefault(root, f"{s.dataset}/name/{names[s.video]}" if sizes[root] > 1 else s.group)
    return [replace(s, group=label[find(s.group)]) for s in samples]


def _root(parent: dict[str, str], x: str) -> str:
    """The representative of x in a disjoint-set forest; a new x is its own."""
    while parent.setdefault(x, x) != x:
        x = parent[x]
    return x
