"""Groups of samples that must never be divided between training and test: fakes with their originals, one person.

The name of a video often says which originals it was made from, or who is in it. `NAMING_RULES` holds one rule for each
convention; a new data set needs one function and one line there.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import replace

from masm_detect.data.sample import Sample

#: Name of a video -> ids of the originals, or of the people, that it shows: () if the name does not follow the
#: convention.
NamingRule = Callable[[str], tuple[str, ...]]


def target_source(name: str) -> tuple[str, ...]:
    """FaceForensics++, FaceShifter and DF40: the fake "000_003" puts the face of video 003 into video 000."""
    return _ids(r"(\d{3})_(\d{3})", name)


def dfd_actors(name: str) -> tuple[str, ...]:
    """DeepFakeDetection: "01__exit_phone_room" is actor 01, "01_02__exit_phone_room__YVGY8LOK" has the face of 02."""
    return _ids(r"(\d{2})_(\d{2})__[a-z_]+__[0-9A-Z]{8}|(\d{2})__[a-z_]+", name, "actor{}")


def celeb_people(name: str) -> tuple[str, ...]:
    """Celeb-DF v1, v2 and ++: "id0_id16_0003" is person 0 with the face of person 16, "id0_0003" person 0.

    Every person is swapped with several others, so the data set has few groups. Its published test list does not keep
    people apart: some of them are in the training videos too.
    """
    return _ids(r"(id\d+)_(id\d+)_\d{4}|(id\d+)_\d{4}(?:_test_.+)?", name)


def deeper_people(name: str) -> tuple[str, ...]:
    """DeeperForensics-1.0: "000_M101" puts the face of actor M101 into video 000 of FaceForensics++."""
    return _ids(r"(\d{3})_([MW]\d{3})|([MW]\d{3})_\w+_camera_[a-z]+", name)


def dfdcp_people(name: str) -> tuple[str, ...]:
    """DFDC preview: "1255229_1003254_A_001" is person 1003254 with the face of 1255229, "1003254_A_001" the person."""
    return _ids(r"(\d{6,7})_(\d{6,7})_[A-Z]_\d{3}|(\d{6,7})_[A-Z]_\d{3}", name)


def dfdc_video(name: str) -> tuple[str, ...]:
    """DFDC: crops "aabyjxwqyo_ppulbuhtsc_0" of a fake and its original, "ppulbuhtsc_0" of one video.

    The names of the videos themselves say nothing: what a fake was made from is in the metadata.json of the data set.
    """
    return _ids(r"([a-z]{10})_([a-z]{10})(?:_\d+)?|([a-z]{10})_\d+", name)


def uadfv_video(name: str) -> tuple[str, ...]:
    """UADFV: "0001_fake" was made from "0001"."""
    return _ids(r"(\d{4})_fake", name)


def ffiw_video(name: str) -> tuple[str, ...]:
    """FFIW-10K: a real video and its fake have one name, "train_00000000"."""
    return _ids(r"((?:train|val|test)_\d{8})", name)


def fakeav_people(name: str) -> tuple[str, ...]:
    """FakeAVCeleb: "id07689/00028_id00747_wavtolip" is person 07689; other ids give the face and the voice."""
    match = re.fullmatch(r"(?:.*/)?(id\d{5})/(\d{5}(?:_.*)?)", name)
    return (match[1], *re.findall(r"(?<=_)id\d{5}(?=_|$)", match[2])) if match else ()


def _ids(pattern: str, name: str, form: str = "{}") -> tuple[str, ...]:
    match = re.fullmatch(pattern, name)
    return tuple(form.format(value) for value in match.groups() if value) if match else ()


#: Convention -> rule; the first rule that returns ids for a name is used. WildDeepfake has none: its names do not say
#: who is in a sequence.
NAMING_RULES: dict[str, NamingRule] = {
    "FaceForensics++": target_source,
    "DeepFakeDetection": dfd_actors,
    "Celeb-DF": celeb_people,
    "DeeperForensics-1.0": deeper_people,
    "DFDCP": dfdcp_people,
    "DFDC": dfdc_video,
    "UADFV": uadfv_video,
    "FFIW": ffiw_video,
    "FakeAVCeleb": fakeav_people,
}


#: The conventions in which the name of a fake always holds two ids.
FAKES_NAME_TWO = ("FaceForensics++", "DeepFakeDetection", "Celeb-DF", "DeeperForensics-1.0", "DFDCP", "DFDC")


def original_ids(name: str) -> tuple[str, ...]:
    """Ids of the originals or people in the video called `name`; () if no rule knows the name."""
    return _read_name(name)[0]


def _read_name(name: str) -> tuple[tuple[str, ...], str]:
    """The ids of a name, and the convention that it follows."""
    return next(((ids, rule) for rule, read in NAMING_RULES.items() if (ids := read(name))), ((), ""))


def with_pair_groups(samples: list[Sample]) -> list[Sample]:
    """One group for a fake, its originals, everything made from them, and all videos of a person, as `NAMING_RULES`
    reads the names.

    An original is the video whose name is its id, or for which a rule returns that id alone. A rule counts in a data
    set only if a fake there follows it: "restaurant_12" alone makes no DFDC. A group that is known already (other than
    the video itself) is kept.
    """
    parent: dict[str, str] = {}
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    read = {name: _read_name(name) for name in names.values()}
    followed = set()
    for s in samples:
        found, rule = read[names[s.video]]
        if s.label == 1 and len(found) > int(rule in FAKES_NAME_TWO):
            followed.add((s.dataset, rule))
    ids = {
        s.video: found if (s.dataset, rule) in followed else ()
        for s in samples
        for found, rule in (read[names[s.video]],)
    }
    for s in samples:
        if ids[s.video]:
            first, *others = (f"{s.dataset}/{one}" for one in sorted(ids[s.video]))
            root(parent, first)
            for other in others:
                parent[root(parent, other)] = root(parent, first)
    if not parent:
        return samples
    members = defaultdict(list)
    for key in sorted(parent):
        members[root(parent, key)].append(key.rsplit("/", 1)[-1])

    def group(s: Sample) -> str:
        key = f"{s.dataset}/{(ids[s.video] or (names[s.video],))[0]}"
        return f"{s.dataset}/pair/{_title(members[root(parent, key)])}" if key in parent else s.group

    return [replace(s, group=group(s)) if s.group == s.video else s for s in samples]


def with_name_groups(samples: list[Sample]) -> list[Sample]:
    """`with_pair_groups`, and then one group for all groups that share a video name under several labels."""
    samples = with_pair_groups(samples)
    parent: dict[str, str] = {}
    names = {s.video: s.video.split("/", 2)[-1] for s in samples}
    first: dict[tuple[str, str], str] = {}
    for s in samples:
        one, other = root(parent, first.setdefault((s.dataset, names[s.video]), s.group)), root(parent, s.group)
        parent[max(one, other)] = min(one, other)
    sizes = Counter(root(parent, group) for group in parent)
    label = {}
    for s in samples:
        top = root(parent, s.group)
        label.setdefault(top, f"{s.dataset}/name/{names[s.video]}" if sizes[top] > 1 else s.group)
    return [replace(s, group=label[root(parent, s.group)]) for s in samples]


def _title(members: list[str]) -> str:
    """The members of a group, if there are few: a group of people can hold most of a data set."""
    return "_".join(members) if len(members) <= 4 else f"{members[0]}_and_{len(members) - 1}_more"


def root(parent: dict[str, str], x: str) -> str:
    """The representative of x in a disjoint-set forest; a new x is its own."""
    while parent.setdefault(x, x) != x:
        x = parent[x]
    return x
