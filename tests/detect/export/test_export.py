"""Exports of a tiny run: certificate, limit, what is written, what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
import yaml
from command_line import assert_one_line, code_of
from huggingface_hub import ModelCard
from masm_detect.data.crop_recipe import CropRecipe, read_recipe, write_recipe
from masm_detect.data.sources import read_dataset
from masm_detect.evaluation.calibration import fit_calibration, load_calibration, save_calibration
from masm_detect.evaluation.runs import load_run
from masm_detect.export import export as export_module
from masm_detect.export import hf_format
from masm_detect.export.export import export_run
from masm_detect.export.format import ExportError
from masm_detect.export.registry import FORMATS
from masm_detect.hashes import file_sha256


def export(run, out, format, **options):
    options = {"data": [str(run.parent / "data")], "allow_fewer": True, "progress": False} | options
    return export_run(str(run), format=format, out=str(out), **options)


@pytest.fixture(scope="module")
def exported(tiny_run, tmp_path_factory):
    """The folder with the exports onnx/, hf/ and adapter/ of the tiny run."""
    folder = tmp_path_factory.mktemp("exports")
    for format in FORMATS:
        export(tiny_run, folder / format, format)
    assert {path.name for path in folder.iterdir()} == set(FORMATS)
    return folder


@pytest.mark.parametrize("format", FORMATS)
def test_certificate_is_what_the_files_compute(tiny_run, exported, format):
    certificate = json.loads((exported / format / "certificate.json").read_text())
    samples = read_dataset(tiny_run.parent / "data")
    assert certificate["crops"]["count"] == len(samples) == 24
    listed = "".join(file_sha256(sample.path) + "\n" for sample in samples)
    assert certificate["crops"]["list_sha256"] == hashlib.sha256(listed.encode()).hexdigest()
    same = certificate["difference_on_the_same_pixels"]
    assert 0 <= same["mean"] <= same["largest"] < 1e-5 and same["quantiles"]["1"] == same["largest"]
    [files] = certificate["difference_from_image_files"].values()
    assert files["count"] == 24 and files["largest"] < 1e-5
    for name, digest in certificate["files"].items():
        assert file_sha256(exported / format / name) == digest


def test_onnx_alone_gives_the_logits_for_any_batch(tiny_run, exported, seed):
    _, detector = load_run(tiny_run)
    session = onnxruntime.InferenceSession(exported / "onnx" / "model.onnx")
    for batch in (1, 5):
        pixels = torch.randn(batch, 3, 28, 28)
        with torch.inference_mode():
            expected = detector.eval()(pixels).numpy()
        [logits] = session.run(None, {"pixel_values": pixels.numpy()})
        assert logits.shape == (batch,) and np.abs(logits - expected).max() < 1e-5
    settings = json.loads((exported / "onnx" / "preprocessing.json").read_text())
    assert settings["size"] == 28 and settings["crops"] is None and settings["labels"] == {"0": "real", "1": "fake"}


def test_adapter_is_a_run_for_the_other_commands(tiny_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    write_recipe(run, CropRecipe("tile", 28))
    groups = [str(number) for number in range(40)]
    learned = fit_calibration(np.linspace(0.2, 0.9, 40), np.repeat([0, 1], 20), groups)
    save_calibration(run, replace(learned, features=np.eye(16, dtype=np.float32)), {"images": 40})
    data = str(tiny_run.parent / "data")
    export(run, tmp_path / "small", "adapter", data=[data])
    export(run, tmp_path / "hf", "hf", data=[data])
    assert read_recipe(tmp_path / "small") == CropRecipe("tile", 28)
    kept = load_calibration(tmp_path / "small")
    assert kept.thresholds == learned.thresholds and np.array_equal(kept.features, np.eye(16))
    assert json.loads((tmp_path / "small" / "calibration.json").read_text())["provenance"] == {"images": 40}
    assert json.loads((tmp_path / "hf" / "preprocessing.json").read_text())["crops"]["size"] == 28
    config = yaml.safe_load((tmp_path / "small" / "config.yaml").read_text())
    assert config["data"]["paths"] == ["data"] and config["out"] == "run"
    assert code_of(["eval", str(tmp_path / "small"), "--data", data, "--out", str(tmp_path / "eval")]) == 0
    assert (tmp_path / "eval" / "results.json").is_file()


def test_card_describes_the_run(tiny_run, tmp_path):
    export(tiny_run, tmp_path / "mine", "hf", license="apache-2.0")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.license == "apache-2.0"
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    [numbers] = metrics["source_validation"]["datasets"].values()
    row = next(line for line in card.text.splitlines() if "| stripes |" in line)
    assert f"| {numbers['all']['n_real']} | {numbers['all']['n_fake']} |" in row
    assert f"{metrics['trainable_parameters']:,}" in card.text and "as far as this detector can tell" in card.text
    export(tiny_run, tmp_path / "other", "adapter")
    assert ModelCard.load(tmp_path / "other" / "README.md").data.license == "unknown: ask the base model's"


def test_no_file_holds_the_path_of_the_data(tiny_run, exported):
    data = str(tiny_run.parent / "data").encode()
    files = [path for path in exported.rglob("*") if path.is_file()]
    assert len(files) > 12 and [path for path in files if data in path.read_bytes()] == []


def test_a_difference_above_the_limit_leaves_nothing(tiny_run, tmp_path, monkeypatch):
    plain = hf_format.make_plain

    def shifted(detector):
        plain(detector)
        detector.head.bias.data += 0.0625

    monkeypatch.setattr(hf_format, "make_plain", shifted)
    with pytest.raises(ExportError, match=r"on the same pixels, is 0\.0625 over 24 crops, above the limit of 0\.001"):
        export(tiny_run, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []
    assert export(tiny_run, tmp_path / "out", "hf", limit=0.1)["limit"] == 0.1


def test_wrong_preprocessing_is_above_the_limit(tiny_run, tmp_path, monkeypatch):
    right = hf_format.processor_config
    monkeypatch.setattr(hf_format, "processor_config", lambda run: right(run) | {"image_mean": [0.5, 0.5, 0.5]})
    with pytest.raises(ExportError, match="from the image files, by pil"):
        export(tiny_run, tmp_path / "out", "hf")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_one_line(tiny_run, tmp_path, capsys):
    begin = ["export", str(tiny_run), "--progress", "false", "--format"]
    for arguments, message in (
        (["onnx"], "needs 256 crops, but the validation data of the run has"),
        (["onnx", "--images", "8"], "at least 256, or give --allow-fewer"),
        (["onnx", "--limit", "0"], "limit is 0.0"),
        (["torchscript"], "format"),
    ):
        assert code_of([*begin, *arguments, "--out", str(tmp_path / "out")]) == 2
        assert_one_line(capsys.readouterr().err, message)
        assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    assert code_of([*begin, "adapter", "--out", str(tmp_path / "full")]) == 2
    assert_one_line(capsys.readouterr().err, "is not empty: give another --out")
    assert code_of(["export", str(tmp_path / "full"), "--format", "hf", "--out", str(tmp_path / "out")]) == 2
    assert_one_line(capsys.readouterr().err, "does not exist: is")


def test_validation_data_by_default(tiny_run, tmp_path, capsys):
    out = str(tmp_path / "out")
    arguments = ["export", str(tiny_run), "--format", "hf", "--out", out, "--allow-fewer", "--progress", "false"]
    assert code_of(arguments) == 0
    assert "the validation data of the run" in capsys.readouterr().out
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    certificate = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert certificate["crops"]["count"] == metrics["samples"]["val"]


@pytest.mark.parametrize(
    ("changes", "formats"),
    [({"crop": "center"}, ("onnx", "hf")), ({"normalize_first": (24, 80)}, ("onnx", "hf"))],
)
def test_other_preprocessing(tiny_run, tmp_path, seed, monkeypatch, changes, formats):
    """Larger images, a centre crop, JPEG before everything else: the export's own code reads the files."""
    random = np.random.default_rng(seed)
    for kind in ("real", "fake-noise"):
        (tmp_path / "large" / kind).mkdir(parents=True)
        for index in range(3):
            image = cv2.GaussianBlur(random.integers(0, 255, (40 + index, 57, 3), dtype=np.uint8), (0, 0), 2)
            assert cv2.imwrite(str(tmp_path / "large" / kind / f"{index}.jpg"), image)
    loaded = load_run

    def with_changes(folder, device="cpu"):
        config, detector = loaded(folder, device)
        return replace(config, data=replace(config.data, **changes)), detector

    monkeypatch.setattr(export_module, "load_run", with_changes)
    for format in formats:
        certificate = export(tiny_run, tmp_path / format, format, data=[str(tmp_path / "large")])
        [found] = certificate["difference_from_image_files"].values()
        assert found["count"] == 6 and found["largest"] < 1e-4
        needed = certificate["needed_import"]
        assert (needed is not None) == (format == "hf" and "normalize_first" in changes)
        if needed is not None:
            assert needed["module"] == "masm_detect.hub" and "normalize_first" in needed["reason"]
