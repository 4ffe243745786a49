"""From data sets to training and validation samples: leaks and merged names are refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from masm_detect.config import ConfigError, DataConfig
from masm_detect.data.deepfakebench import write_deepfakebench
from masm_detect.data.folders import read_folder
from masm_detect.data.sample import DatasetError
from masm_detect.data.sources import load_samples, read_dataset, source_splits


def test_broken_files(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(DatasetError, match="no such file"):
        read_dataset(path)
    path.write_text("{")
    with pytest.raises(DatasetError, match="not valid JSON"):
        read_dataset(path)
    path.write_text("[1]")
    with pytest.raises(DatasetError, match="expected a table of data sets, got list"):
        read_dataset(path)
    path.write_text('{"D": {"real": {"test": {"v": {"label": "real"}}}}}')
    with pytest.raises(DatasetError, match="D/real/test/v"):
        read_dataset(path)
    path.write_text('{"D": {"real": {"test": {"v": {"label": "real", "frames": [0, 10]}}}}}')
    with pytest.raises(DatasetError, match=r"D/real/test/v: frames must be paths, got 0 \(int\)"):
        read_dataset(path)
    path.write_text('{"D": {"real": {"test": {}}}}')
    with pytest.raises(DatasetError, match=r"no split \['train'\], it has \['test'\]"):
        read_dataset(path, splits=["train"])


def test_a_group_in_several_splits_is_refused(tiny_data, tmp_path):
    """As the published DeepfakeBench files have it: the test videos again, as val."""
    samples = read_folder(tiny_data)
    side = {"train": lambda n: n < 8, "val": lambda n: n >= 8, "test": lambda n: n >= 8}
    for leak in (("train", "val", "test"), ("train", "test", "test")):
        parts = [
            replace(s, split=name, path=s.path if i < 2 else f"{s.path}-copy")
            for i, name in enumerate(("train", "val", "test"))
            for s in samples
            if side[leak[i]](int(s.path[-6:-4]))
        ]
        for s in parts:
            if s.path.endswith("-copy"):
                shutil.copy(s.path.removesuffix("-copy"), s.path)
        write_deepfakebench(parts, tmp_path / "leak.json")
        config = DataConfig(paths=[str(tmp_path / "leak.json")])
        with pytest.raises(DatasetError, match=r"in \['test', 'val'\].*repeat the test videos as val.*data\.splits"):
            source_splits(config)
        train_part, val_part = source_splits(replace(config, splits=["train"]))
        assert not {s.group for s in train_part} & {s.group for s in val_part}
        assert {s.split for s in (*train_part, *val_part)} == {"train", "val"}


def test_paths_of_one_name_do_not_merge(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "other" / "data")
    with pytest.raises(DatasetError, match="'data/fake-stripes/00', and would be merged: rename"):
        load_samples([str(tiny_data), str(tmp_path / "other" / "data")])
    with pytest.raises(ConfigError, match="given twice"):
        load_samples([str(tiny_data), str(tiny_data)])
    samples = read_folder(tiny_data)
    names = [str(tmp_path / f"{part}.json") for part in ("train", "val")]
    for name, part in zip(names, (samples[::2], samples[1::2])):
        write_deepfakebench(part, name)
    assert len(load_samples(names)) == 24  # one data set in two files, no video in both
    fakes = tmp_path / "more" / "data" / "fake-other"
    fakes.mkdir(parents=True)
    shutil.copy(samples[0].path, fakes / "x.png")
    with pytest.raises(DatasetError, match="both hold the data set 'data'"):
        load_samples([str(tiny_data), str(fakes.parent)])
