"""Hugging Face data sets as a source: parquet files, image folders and saved data sets, written by the tests."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from masm_detect.config import ConfigError, DataConfig, EvalConfig, HfConfig, OptimConfig
from masm_detect.data import hf_images
from masm_detect.data.contents import read_contents
from masm_detect.data.decode import UnreadableImage, byte_size, read_bytes
from masm_detect.data.folders import read_folder
from masm_detect.data.frames import FrameDataset
from masm_detect.data.hf_datasets import read_huggingface
from masm_detect.data.hf_images import Source, is_key
from masm_detect.data.loading import Batches, in_order
from masm_detect.data.sample import DatasetError
from masm_detect.data.sources import load_samples
from masm_detect.data.transforms import ImageTransform
from masm_detect.doctor.examine import examine
from masm_detect.errors import CheckpointError
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import die_at, run_config, write_data

datasets = pytest.importorskip("datasets", reason="needs the extra masm_ext[datasets]")
pq = pytest.importorskip("pyarrow.parquet", reason="needs the extra masm_ext[datasets]")
pa = pytest.importorskip("pyarrow")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """What `datasets` converts is kept in the folder of the test, and what was opened is forgotten."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for cache in (hf_images._open, hf_images._images, hf_images._source):
        cache.cache_clear()


def rows_of(folder: Path, **columns) -> dict:
    """The images of a folder with real/ and fake-*/ as columns: image, label, and those named {column: of a file}."""
    files = [Path(sample.path) for sample in read_folder(folder)]
    made = {name: [make(file) for file in files] for name, make in columns.items()}
    return {"image": [file.read_bytes() for file in files], "label": [file.parent.name for file in files]} | made


def parquet(folder: Path, columns: dict, name: str = "train.parquet") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / name)
    return f"hf:{folder}"


def test_parquet_holds_the_samples_and_bytes_of_the_folder(tmp_path, tiny_data):
    path = parquet(tmp_path / "p" / "data", rows_of(tiny_data, video=lambda file: file.stem))
    samples, files = read_huggingface(path), read_folder(tiny_data)
    assert [replace(s, path="", split="") for s in samples] == [replace(s, path="") for s in files]
    assert {s.split for s in samples} == {"train"} and all(is_key(s.path) for s in samples)
    assert [read_bytes(s.path) for s in samples] == [Path(s.path).read_bytes() for s in files]
    assert [byte_size(s.path) for s in samples] == [Path(s.path).stat().st_size for s in files]
    assert read_contents(samples) == read_contents(files)


def test_image_folder_keeps_its_files(tiny_data):
    with pytest.warns(UserWarning, match=r"neither a column video nor a column group.*--data\.hf\.group"):
        samples = read_huggingface(f"hf:{tiny_data}")
    files = read_folder(tiny_data)
    found = {(s.path, s.label, s.method, s.dataset) for s in samples}
    assert found == {(s.path, s.label, s.method, s.dataset) for s in files} and len(samples) == 24
    assert len({s.group for s in samples}) == 24


def test_saved_data_set_with_its_own_columns(tmp_path, tiny_data):
    """Class names, rows in another order than on disk, two splits, other column names, groups."""
    columns = rows_of(tiny_data, person=lambda file: int(file.stem) // 3, kind=lambda file: 1)
    columns = {"photo": columns.pop("image"), "is": [int(label != "real") for label in columns.pop("label")], **columns}
    features = datasets.Features(
        {"photo": datasets.Image(), "is": datasets.ClassLabel(names=["Real", "synthetic"]),
         "person": datasets.Value("int64"), "kind": datasets.ClassLabel(names=["none", "gan/a"])}
    )  # fmt: skip
    rows = datasets.Dataset.from_dict(columns, features=features).shuffle(seed=3)
    saved = datasets.DatasetDict({"train": rows.select(range(5, 15)), "validation": rows.select(range(15, 24))})
    saved.save_to_disk(tmp_path / "saved")
    config = HfConfig(image="photo", label="is", method="kind", group="person")
    with pytest.raises(DatasetError, match=r"label 'synthetic' is not in the table.*label_map"):
        read_huggingface(f"hf:{tmp_path / 'saved'}", config)
    samples = read_huggingface(f"hf:{tmp_path / 'saved'}", config, {"synthetic": 1})
    assert [s.split for s in samples] == ["train"] * 10 + ["val"] * 9
    order = [row for part in (rows.select(range(5, 15)), rows.select(range(15, 24))) for row in part]
    assert [(s.label, s.method, s.group) for s in samples] == [
        (row["is"], "gan/a" if row["is"] else "real", f"saved/{row['person']}") for row in order
    ]
    raw = rows.cast_column("photo", datasets.Image(decode=False))
    assert [read_bytes(s.path) for s in samples] == [raw[i]["photo"]["bytes"] for i in range(5, 24)]
    assert samples[0].path == f"hf:{tmp_path / 'saved'}?image=photo/train/0000000"


def test_a_key_is_all_that_a_worker_needs(tmp_path, tiny_data):
    for source in (Source("a/b"), Source("/x/y", "c 1", "im/age?&"), Source("n", image="é")):
        assert hf_images._source(str(source)) == source
    samples = read_huggingface(parquet(tmp_path / "p", rows_of(tiny_data, video=lambda file: file.stem)))
    dataset = FrameDataset(samples, ImageTransform(28, (0.5,) * 3, (0.5,) * 3))
    batches = in_order(len(samples), 5)
    here = [images for images, _ in Batches(dataset, batches, torch.device("cpu"), 0)]
    hf_images._images.cache_clear()
    hf_images._open.cache_clear()
    there = [images for images, _ in Batches(dataset, batches, torch.device("cpu"), 2)]
    assert all(map(torch.equal, here, there)) and len(there) == 5


@pytest.fixture
def hf_config(tmp_path, tiny_data, tiny_backbone):
    """(out, data path) -> a run on the images of `tiny_data`, by default as a parquet file of the same name."""
    path = parquet(tmp_path / "p" / "data", rows_of(tiny_data, video=lambda file: file.stem))

    def make(out: str, data: str = path, **changes):
        config = run_config(tiny_data, tiny_backbone, tmp_path / out, **changes)
        return replace(config, data=replace(config.data, paths=[data]))

    return make


def test_a_run_equals_that_on_files(tmp_path, tiny_data, hf_config):
    one = OptimConfig(epochs=1, batch_size=4)
    results = [train(hf_config("hf", optim=one)), train(hf_config("files", str(tiny_data), optim=one))]
    assert results[0].fit.history[0]["val_loss"] == results[1].fit.history[0]["val_loss"]
    assert (tmp_path / "hf" / "groups.json").read_text() == (tmp_path / "files" / "groups.json").read_text()
    weights = [[p for p in result.detector.parameters() if p.requires_grad] for result in results]
    assert all(map(torch.equal, *weights))


def test_killed_and_resumed_equals_uninterrupted(tmp_path, hf_config, monkeypatch):
    train(hf_config("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)  # in the middle of an epoch
        train(hf_config("killed"))
    for cache in (hf_images._open, hf_images._images):
        cache.cache_clear()
    train(replace(hf_config("killed"), resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resume_notices_other_images(tmp_path, tiny_data, hf_config):
    config = hf_config("run", optim=OptimConfig(epochs=1, batch_size=4))
    train(config)
    columns = rows_of(tiny_data, video=lambda file: file.stem)
    columns["image"][3] += b" "
    parquet(tmp_path / "p" / "data", columns)
    for cache in (hf_images._open, hf_images._images):
        cache.cache_clear()
    with pytest.raises(CheckpointError, match="data changed"):
        train(replace(config, resume=True))


def test_eval_recognises_training_images(tmp_path, tiny_data, hf_config):
    train(hf_config("run", optim=OptimConfig(epochs=1, batch_size=4)))
    other = write_data(tmp_path / "other", seed=1)
    both = {key: a + b for (key, a), b in zip(rows_of(tiny_data).items(), rows_of(other).values())}
    columns = both | {"clip": list(range(48))}
    path = parquet(tmp_path / "mixed", columns, "test.parquet")
    config = EvalConfig(runs=[str(tmp_path / "run")], paths=[path], out=str(tmp_path / "eval"), split="test",
                        hf=HfConfig(video="clip"))  # fmt: skip
    seen = evaluate(replace(config, runtime=replace(config.runtime, progress=False)))["runs"]["run"]["seen_in_training"]
    assert seen["files"] == 20 and seen["of_samples"] == 48


@pytest.mark.parametrize("damage, what", [(b"", "is empty"), (b"\x89PNG\r\n\x1a\n\0\0", "is truncated")])
def test_a_damaged_image_is_named_before_the_first_step(tmp_path, tiny_data, tiny_backbone, damage, what):
    columns = rows_of(tiny_data, video=lambda file: file.stem)
    columns["image"][5] = damage
    path = parquet(tmp_path / "p", columns)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run")
    with pytest.raises(UnreadableImage, match=rf"hf:.*/train/0000005 {what}"):
        train(replace(config, data=replace(config.data, paths=[path])))
    columns["image"][5] = None
    path = parquet(tmp_path / "q", columns)
    with pytest.raises(UnreadableImage, match=r"hf:.*/train/0000005 is empty"):
        read_contents(read_huggingface(path))


def test_errors_name_the_column_and_the_option(tmp_path, tiny_data):
    columns = rows_of(tiny_data)
    path = parquet(tmp_path / "p", columns)
    for config, message in (
        (HfConfig(image="photo"), r"has no column 'photo', it has \['image', 'label'\].*--data\.hf\.image"),
        (HfConfig(label="is_fake"), r"has no column 'is_fake'.*--data\.hf\.label"),
        (HfConfig(video="clip"), r"has no column 'clip'.*--data\.hf\.video"),
        (HfConfig(split="label"), r"has a split 'fake-stripes'.*--data\.hf\.split"),
    ):
        with pytest.raises(DatasetError, match=message):
            read_huggingface(path, config)
    for number, (label, message) in enumerate([
        ([int(label != "real") for label in columns["label"]], r"numbers or truth values such as [01].*label_map"),
        ([label != "real" for label in columns["label"]], r"numbers or truth values such as (True|False),.*label_map"),
        ([*columns["label"][:-1], None], r"row 23 has no value in the column 'label'"),
    ]):  # fmt: skip
        wrong = parquet(tmp_path / f"wrong{number}", columns | {"label": label})
        with pytest.raises(DatasetError, match=message):
            read_huggingface(wrong)
    no_images = parquet(tmp_path / "numbers", columns | {"image": list(range(24))})
    with pytest.raises(DatasetError, match=r"the column 'image' holds no images"):
        read_huggingface(no_images)
    holdout = parquet(tmp_path / "holdout", columns | {"part": ["holdout"] * 24})
    with pytest.raises(DatasetError, match=r"has a split 'holdout', which is not known.*column"):
        read_huggingface(holdout, HfConfig(split="part"))
    with pytest.raises(DatasetError, match=r"cannot be opened.*nowhere"):
        read_huggingface(f"hf:{tmp_path / 'nowhere'}")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("words")
    with pytest.raises(DatasetError, match=r"is read as 'text', which holds no images"):
        read_huggingface(f"hf:{tmp_path / 'text'}")
    with pytest.raises(DatasetError, match="without a question mark"):
        read_huggingface("hf:")


def test_numbers_with_a_label_map(tmp_path, tiny_data):
    """0 is fake in many data sets: the map decides."""
    columns = rows_of(tiny_data)
    labels = [int(label == "real") for label in columns["label"]]
    path = parquet(tmp_path / "p", columns | {"label": labels, "method": ["x"] * 12 + [None] * 12})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        samples = load_samples([path], label_map={"1": 0, "0": 1})
        assert [(s.label, s.method) for s in samples] == [(1, "x")] * 12 + [(0, "real")] * 12
        path = parquet(tmp_path / "no_method", columns | {"label": labels})
        assert {s.method for s in load_samples([path], label_map={"1": 0, "0": 1})} == {"real", "fake"}
    wrong = parquet(tmp_path / "q", columns | {"method": pa.array([None] * 24, pa.string())})
    with pytest.raises(DatasetError, match=r"row 0 is fake and has no value in the column of the method"):
        read_huggingface(wrong)


def test_splits_of_a_run(tmp_path, tiny_data):
    path = parquet(tmp_path / "p", rows_of(tiny_data, video=lambda file: file.stem))
    with pytest.raises(ConfigError, match=r"no sample has the split 'test'; this data has 'train'"):
        load_samples([path], splits=["test"])
    assert DataConfig(paths=path).paths == [path]


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DatasetError, match=r"pip install 'masm_ext\[datasets\]'"):
        read_huggingface("hf:somebody/faces")


def test_doctor_examines_the_rows(tmp_path, tiny_data):
    columns = rows_of(tiny_data, clip=lambda file: file.stem)
    columns["image"][5] = columns["image"][5][:-20]
    path = parquet(tmp_path / "p", columns)
    report = examine([path, str(tiny_data)], hf=HfConfig(video="clip"), progress=False)
    [damaged] = [problem for problem in report["problems"] if problem["kind"] == "damaged"]
    assert damaged["count"] == 1 and "/train/0000005 is truncated" in damaged["lines"][0]
    assert {row["dataset"] for row in report["inventory"]} == {"p", "data"}
    assert sum(row["images"] for row in report["inventory"]) == 47
