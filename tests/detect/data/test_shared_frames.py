"""DeepfakeBench files that share their real videos, and the names and forms that its scripts write."""

from __future__ import annotations

import json

import pytest
from masm_detect.config import DataConfig
from masm_detect.data.checks import check_samples
from masm_detect.data.sample import DatasetError
from masm_detect.data.sources import load_samples, source_splits

SPLITS = {"train": ("000", "001", "002", "003"), "val": ("004",), "test": ("005", "006")}


@pytest.fixture
def write(tmp_path):
    """Writes `<name>.json` with these labels, and a (one-byte) file for every frame; returns its path."""

    def write_file(name, labels, dataset=None, bom=False):
        tree = {}
        for label, (folder, splits) in labels.items():
            for split, videos in splits.items():
                for video in videos:
                    frames = [f"{folder}/{video}/{i:03d}.png" for i in range(2)]
                    for frame in frames:
                        (tmp_path / frame).parent.mkdir(parents=True, exist_ok=True)
                        (tmp_path / frame).write_bytes(b"x")
                    tree.setdefault(label, {}).setdefault(split, {})[video] = {"label": label, "frames": frames}
        data = json.dumps({dataset or name: tree}).encode()
        path = tmp_path / f"{name}.json"
        path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + data)
        return str(path)

    return write_file


@pytest.fixture
def ff(write):
    """FF-DF.json and FF-F2F.json as DeepfakeBench's script writes them."""
    fakes = {split: [f"{v}_{int(v) ^ 1:03d}" for v in videos] for split, videos in SPLITS.items() if split == "train"}
    fakes |= {"val": ["004_007"], "test": ["005_006", "006_005"]}
    return [
        write(name, {"FF-real": ("youtube", SPLITS), name: (f"manipulated/{name}", fakes)})
        for name in ("FF-DF", "FF-F2F")
    ]


def test_shared_reals_are_read_once(ff):
    samples = load_samples(ff)
    check_samples(samples)
    assert {s.dataset for s in samples} == {"FF-DF+FF-F2F"}
    count = {name: sum(s.method == name for s in samples) for name in ("real", "FF-DF", "FF-F2F")}
    assert count == {"real": 14, "FF-DF": 14, "FF-F2F": 14}
    groups = {s.group for s in samples if s.video.split("/")[-1] in ("000", "001", "000_001", "001_000")}
    assert len(groups) == 1  # both forgeries of a pair and its originals
    train, val = source_splits(DataConfig(paths=ff))
    assert len(train) == 24 and len(val) == 6


def test_groups_that_the_files_record_are_joined(write, tmp_path):
    """As `masm prepare` writes them: original and fake of one record group, in files that share the original."""
    one = write("A", {"real": ("youtube", {"train": ["000"]}), "fake-x": ("x", {"train": ["000_003"]})})
    two = write("B", {"real": ("youtube", {"train": ["000"]}), "fake-y": ("y", {"train": ["000_003"]})})
    for name in ("A", "B"):
        tree = json.loads((tmp_path / f"{name}.json").read_text())
        for label in tree[name].values():
            for record in label["train"].values():
                record["group"] = f"{name}/pair/000_003"
        (tmp_path / f"{name}.json").write_text(json.dumps(tree))
    assert len({s.group for s in load_samples([one, two])}) == 1


def test_one_file_of_two_forgeries_is_refused(write):
    one = write("a", {"FF-DF": ("x", {"test": ["v"]})})
    two = write("b", {"FF-F2F": ("x", {"test": ["v"]})})
    with pytest.raises(DatasetError, match="is a 'FF-DF' in 'a/FF-DF/v' and a 'FF-F2F' in 'b/FF-F2F/v'"):
        load_samples([one, two])


def test_one_file_alone_keeps_its_name(ff):
    assert {s.dataset for s in load_samples(ff[:1])} == {"FF-DF"}


def test_three_files_become_one_set(write):
    real = {"FF-real": ("youtube", {"test": ["a", "b"]})}
    files = [write(name, real | {name: (name, {"test": ["c"]})}) for name in ("FF-DF", "FF-FS", "FF-NT")]
    other = write("UADFV", {"UADFV_Real": ("u", {"test": ["a"]}), "UADFV_Fake": ("uf", {"test": ["a"]})})
    samples = load_samples([*files[:2], other, files[2]])
    assert {s.dataset for s in samples} == {"FF-DF+FF-FS+FF-NT", "UADFV"}
    assert len({s.path for s in samples}) == len(samples) == 4 + 6 + 4


def test_a_frame_with_two_labels_or_splits_names_both_places(write):
    one = write("a", {"real": ("x", {"train": ["v"]}), "fake-m": ("y", {"train": ["w"]})})
    label = write("b", {"fake-m": ("x", {"train": ["v"]})})
    split = write("c", {"real": ("x", {"test": ["v"]})})
    with pytest.raises(DatasetError, match=r"x/v/000.png is real in 'a/real/v' and fake in 'b/fake-m/v'"):
        load_samples([one, label])
    with pytest.raises(DatasetError, match=r"'train' \(as 'a/real/v'\) and 'test' \(as 'c/real/v'\)"):
        load_samples([one, split])


def test_one_video_with_other_frames_in_another_file_is_refused(write):
    one = write("a", {"real": ("x", {"train": ["v"]})}, dataset="D")
    same = write("b", {"real": ("x", {"train": ["v"]}), "fake-m": ("y", {"train": ["w"]})}, dataset="D")
    other = write("c", {"real": ("z", {"train": ["v"]})}, dataset="D")
    assert len(load_samples([one, same])) == 4
    with pytest.raises(DatasetError, match="both hold the video 'D/real/v'"):
        load_samples([one, other])


@pytest.mark.parametrize("name", ["validation", "valid", "dev", "val", "Validation"])
def test_names_of_the_validation_split(write, name):
    labels = {"real": ("r", {"train": ["a"], name: ["b"]}), "fake-m": ("f", {"train": ["a"], name: ["b"]})}
    train, val = source_splits(DataConfig(paths=[write("d", labels)]))
    assert {s.video[-1] for s in val} == {"b"} and {s.video[-1] for s in train} == {"a"}


def test_an_unknown_split_is_an_error(write):
    with pytest.raises(DatasetError, match=r"d/real has a split 'holdout'.*rename it.*validation"):
        load_samples([write("d", {"real": ("r", {"holdout": ["a"]})})])


def test_a_byte_order_mark_is_read_over(write):
    assert len(load_samples([write("d", {"real": ("r", {"test": ["a"]})}, bom=True)])) == 2


def test_the_val_split_of_dfdc_is_one_record(write, tmp_path):
    """DeepfakeBench's script assigns the record of the last test video to the split instead of adding it."""
    path = write("DFDC", {name: (name, {"test": ["a", "b"]}) for name in ("DFDC_Real", "DFDC_Fake")})
    tree = json.loads((tmp_path / "DFDC.json").read_text())
    for label in tree["DFDC"]:
        tree["DFDC"][label]["val"] = tree["DFDC"][label]["test"]["b"]
    (tmp_path / "DFDC.json").write_text(json.dumps(tree))
    assert {s.video for s in load_samples([path], splits=["val"])} == {"DFDC/DFDC_Real/b", "DFDC/DFDC_Fake/b"}
    assert len(load_samples([path], splits=["test"])) == 8
    with pytest.raises(DatasetError, match="repeat the test videos as val"):
        load_samples([path])


@pytest.mark.parametrize(
    ("dataset", "real", "fake"),
    [
        ("DeeperForensics-1.0", "DF_real", "DF_fake"),
        ("DeepFakeDetection", "DFD_real", "DFD_fake"),
        ("FaceShifter", "FF-real", "FF-FH"),
        ("Celeb-DF-v1", "CelebDFv1_real", "CelebDFv1_fake"),
        ("Celeb-DF-v2", "CelebDFv2_real", "CelebDFv2_fake"),
        ("DFDCP", "DFDCP_Real", "DFDCP_FakeA"),
        ("DFDC", "DFDC_Real", "DFDC_Fake"),
        ("UADFV", "UADFV_Real", "UADFV_Fake"),
    ],
)
def test_every_data_set_that_the_benchmark_writes(write, dataset, real, fake):
    samples = load_samples([write(dataset, {real: ("r", {"test": ["a"]}), fake: ("f", {"test": ["a"]})})])
    assert [s.label for s in samples] == [0, 0, 1, 1]
