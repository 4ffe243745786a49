"""A fake and its originals are one group."""

from __future__ import annotations

import pytest
from masm_detect.data.folders import read_folder
from masm_detect.data.groups import NAMING_RULES, original_ids, with_pair_groups
from masm_detect.data.sample import Sample


def touch(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_a_picture_and_its_forgeries_are_one_group(tmp_path):
    for name in ("real/a.png", "fake-x/a.jpg", "fake-y/a/0.png", "real/b.png", "fake-x/c.png"):
        touch(tmp_path / "set" / name)
    groups = {s.video: s.group for s in read_folder(tmp_path / "set")}
    assert groups == {
        "set/real/a": "set/name/a",
        "set/fake-x/a": "set/name/a",
        "set/fake-y/a": "set/name/a",
        "set/real/b": "set/real/b",
        "set/fake-x/c": "set/fake-x/c",
    }


def test_equal_names_of_pairs_keep_the_pair(tmp_path):
    for name in ("real/000/0.png", "real/003/0.png", "fake-DF/000_003/0.png", "fake-NT/000_003/0.png"):
        touch(tmp_path / "ff" / name)
    assert {s.group for s in read_folder(tmp_path / "ff")} == {"ff/pair/000_003"}


#: Names of the published lists, and the ids that they show.
NAMES = {
    "FaceForensics++": {"000_003": ("000", "003"), "183_253": ("183", "253"), "000": ()},
    "DeepFakeDetection": {
        "01__exit_phone_room": ("actor01",),
        "19__outside_talking_pan_laughing": ("actor19",),
        "01_02__exit_phone_room__YVGY8LOK": ("actor01", "actor02"),
        "22_10__outside_talking_still_laughing__J2HR5HKH": ("actor22", "actor10"),
    },
    "Celeb-DF": {
        "id1_0007": ("id1",),
        "id25_0010": ("id25",),
        "id1_id0_0007": ("id1", "id0"),
        "id46_id41_0000": ("id46", "id41"),
        "00170": (),
    },
    "DeeperForensics-1.0": {
        "000_M101": ("000", "M101"),
        "018_W007": ("018", "W007"),
        "M101_light_down_contempt_camera_front": ("M101",),
    },
    "DFDCP": {"1255229_1003254_A_001": ("1255229", "1003254"), "643049_A_001": ("643049",)},
    "DFDC": {
        "aabyjxwqyo_ppulbuhtsc_0": ("aabyjxwqyo", "ppulbuhtsc"),
        "aaapwqhxli_2": ("aaapwqhxli",),
        "vudstovrck": (),
    },
    "UADFV": {"0000_fake": ("0000",), "0000": ()},
    "FFIW": {"train_00000000": ("train_00000000",), "val_00000000": ("val_00000000",)},
    "FakeAVCeleb": {
        "id00076/00109": ("id00076",),
        "id07689/00028_id00747_wavtolip": ("id07689", "id00747"),
        "id07686/00254_id06437_3BZvvzBhj8s_id00043_wavtolip": ("id07686", "id06437", "id00043"),
        "id00225/00078_fake": ("id00225",),
    },
}


@pytest.mark.parametrize("data_set", NAMING_RULES)
def test_names_of_the_published_lists(data_set):
    for name, ids in NAMES[data_set].items():
        assert original_ids(name) == ids, name
        # no other rule reads it in another way
        assert {rule(name) for other, rule in NAMING_RULES.items() if other != data_set} <= {(), ids}


@pytest.mark.parametrize("name", ["a", "clip_1", "2024-05-01", "IMG_0001", "video 12", "interview_two_3", "v1/0001"])
def test_names_of_ones_own_are_left_alone(name):
    assert original_ids(name) == ()


def groups_of(names, dataset="D"):
    samples = [
        Sample(n, int(label), dataset, "m" if label else "real", f"{dataset}/l{label}/{n}") for n, label in names
    ]
    return {s.path: s.group for s in with_pair_groups(samples)}


def test_all_videos_of_a_person_are_one_group_also_without_a_fake():
    celeb = groups_of(
        [("id0_0000", 0), ("id16_0002", 0), ("id0_id16_0000", 1), ("id36_0001", 0), ("id36_0002", 0), ("00170", 0)]
    )
    assert celeb["id0_0000"] == celeb["id16_0002"] == celeb["id0_id16_0000"] == "D/pair/id0_id16"
    assert celeb["id36_0001"] == celeb["id36_0002"] != celeb["id0_0000"]
    assert celeb["00170"] == "D/l0/00170"
    assert len(set(groups_of([("0001", 0), ("0001_fake", 1), ("0002", 0)]).values())) == 2


def test_a_rule_counts_only_where_a_fake_follows_it():
    plain = [(f"restaurant_{i}", i % 2) for i in range(4)]
    assert len(set(groups_of(plain).values())) == 4
    crops = [("ppulbuhtsc_0", 0), ("ppulbuhtsc_1", 0), ("aabyjxwqyo_ppulbuhtsc_0", 1), ("aaapwqhxli_0", 0)]
    found = groups_of(crops)
    assert len(set(found.values())) == 2 and found["aaapwqhxli_0"] != found["ppulbuhtsc_1"]


def test_a_large_group_has_a_short_name():
    ring = [(f"id{i}_id{i + 1}_0000", 1) for i in range(30)]
    assert set(groups_of(ring).values()) == {"D/pair/id0_and_30_more"}
