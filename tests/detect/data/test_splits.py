"""Splits keep groups whole, drawn by shares or read from a table."""

from __future__ import annotations

import json

import pytest
from masm_detect.config import ConfigError
from masm_detect.data.sample import PrepareError, Sample
from masm_detect.data.splits import assign_splits, split_by_group


def sample(group: str, label: int, index: int = 0, split: str = "") -> Sample:
    return Sample(f"{group}-{index}", label, "d", "f" if label else "real", f"d/{label}/{group}", split, group)


def test_split_keeps_groups_and_classes_together():
    samples = [sample(f"{label}-{group}", label, i) for label in (0, 1) for group in range(10) for i in range(3)]
    shared = [sample(f"photo-{group}", label) for label in (0, 1) for group in range(5)]
    for data in (samples, shared):
        done = split_by_group(data, 0.2, seed=1)
        sides = {side: {s.group for s in done if s.split == side} for side in ("train", "val")}
        assert not sides["train"] & sides["val"]
        assert all({s.label for s in done if s.split == side} == {0, 1} for side in sides)
    kept = split_by_group([*samples, sample("x", 0, split="val"), sample("y", 1, split="test")], 0.2, seed=1)
    assert {s.split for s in kept[:-2]} == {"train"} and [s.split for s in kept[-2:]] == ["val", "test"]
    with pytest.raises(ConfigError, match=r"1 real group"):
        split_by_group([sample("a", 0), sample("b", 1), sample("c", 1)], 0.5, seed=0)


PAIRS = ["183_253", "469_481", "866_878", "585_599", "672_720"]
KEYS = [f"real/{i}" for p in PAIRS for i in p.split("_")] + [f"fake-DF/{p}" for p in PAIRS] + ["fake-NT/253_183"]


def test_splits_by_share_keep_pairs_together():
    splits = assign_splits("ff", KEYS, (0.6, 0.2, 0.2), seed=1)
    assert {s: sum(v == s for k, v in splits.items() if k.startswith("fake-DF")) for s in ("train", "val", "test")} == {
        "train": 3, "val": 1, "test": 1,
    }  # fmt: skip
    assert splits["real/183"] == splits["real/253"] == splits["fake-DF/183_253"] == splits["fake-NT/253_183"]
    assert splits == assign_splits("ff", list(reversed(KEYS)), (0.6, 0.2, 0.2), seed=1)
    assert len({tuple(assign_splits("ff", KEYS, (0.6, 0.2, 0.2), seed=s).values()) for s in range(5)}) > 1
    with pytest.raises(PrepareError, match="2 groups cannot fill 3 splits"):
        assign_splits("ff", ["real/183", "real/253", "fake-DF/183_253", "real/585"], (0.6, 0.2, 0.2))
    with pytest.raises(PrepareError, match="sum to 1"):
        assign_splits("ff", KEYS, (0.6, 0.2))


def test_splits_keep_a_picture_and_its_forgeries_together():
    keys = [f"{kind}/{n}" for kind in ("real", "fake-a", "fake-b") for n in range(10)]
    splits = assign_splits("d", keys, (0.6, 0.2, 0.2), seed=1)
    assert all(len({splits[f"{kind}/{n}"] for kind in ("real", "fake-a", "fake-b")}) == 1 for n in range(10))
    assert set(splits.values()) == {"train", "val", "test"}


def test_splits_from_a_file(tmp_path):
    path = tmp_path / "splits.json"
    table = {"train": [["183", "253"], ["469", "481"], ["866", "878"]], "val": [["585", "599"]], "test": ["672", "720"]}
    path.write_text(json.dumps(table))
    splits = assign_splits("ff", KEYS, path)
    assert splits["fake-NT/253_183"] == "train" and splits["real/599"] == "val" and splits["fake-DF/672_720"] == "test"
    with pytest.raises(PrepareError, match="real/585 is in no split"):
        assign_splits("ff", KEYS, table | {"val": []})
    with pytest.raises(PrepareError, match="'183' is in two splits"):
        assign_splits("ff", KEYS, table | {"val": [["585", "599"], "183"]})
    with pytest.raises(PrepareError, match=r"is in the splits \['test', 'val'\]"):
        assign_splits("ff", [*KEYS, "fake-DF/599_672"], table)
    with pytest.raises(PrepareError, match="split names must be among"):
        assign_splits("ff", KEYS, {"training": []})
    path.write_text("[")
    with pytest.raises(PrepareError, match="cannot read the split file"):
        assign_splits("ff", KEYS, path)
