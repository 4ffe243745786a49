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

#: Name of a video -> ids of the originals that it shows: () if the name does not follow the convention.
NamingRule = Callable[[str], tuple[str, ...]]

_PAIR_NAME = re.compile(r"^(\d{3})_(\d{3})$")


def target_source(name: str) -> tuple[str, ...]:
    """FaceForensics++: the fake "000_003" puts the face of video 003 into video 000."""
    pair = _PAIR_NAME.match(name)
    return pair.groups() if pair else ()


#: Convention -> rule; the first rule that returns ids for a name is used.
NAMING_RULES: dict[str, NamingRule] = {
    "FaceForensics++": target_source,
}


def original_ids(name: str) -> tuple[str, ...]:
    """Ids of the originals in the video called `name`; () if no rule knows the name."""
    return next((ids for rule in NAMING_RULES.values() if (ids := rule(name))), ())


def with_pair_groups(samples: list[Sample]) -> list[Sample]:
    """One group for a fake, its originals, and everything made from them, as `NAMING_RULES` reads the names.

    An original is the video whose name is its id, or for which a rule returns that id alone. A group that is known
    already (other than the video itself) is kept.
    """
    parent: dict[str, str] = {}
    find = partial(_root, parent)
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    ids = {name: original_ids(name) for name in names.values()}
    for s in samples:
        if s.label == 1 and ids[names[s.video]]:
            first, *others = (f"{s.dataset}/{one}" for one in sorted(ids[names[s.video]]))
            find(first)
            for other in others:
                parent[find(other)] = find(first)
    if not parent:
        return samples
    members = defaultdict(list)
    for key in sorted(parent):
        members[find(key)].append(key.rsplit("/", 1)[-1])

    def group(s: Sample) -> str:
        name = names[s.video]
        key = f"{s.dataset}/{(ids[name] or (name,))[0]}"
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
