"""Every file is read once: damaged ones are found before a run."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from masm_detect.data.contents import describe, jpeg_quality, read_contents, survey
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.folders import read_folder
from masm_detect.training.run import train
from PIL import Image
from tiny import run_config


def test_contents_are_in_the_order_of_the_samples(tiny_data):
    samples = read_folder(tiny_data)
    contents = read_contents(samples)
    assert len({c.fingerprint for c in contents}) == 24 and all(len(c.fingerprint) == 16 for c in contents)
    assert read_contents(samples[::-1]) == contents[::-1] and read_contents([]) == []
    assert {(c.width, c.height, c.format, c.quality) for c in contents} == {(28, 28, "PNG", None)}
    assert [c.size for c in contents] == [Path(s.path).stat().st_size for s in samples]
    copy = samples[3].path + ".copy.png"
    shutil.copy(samples[3].path, copy)
    assert read_contents([replace(samples[3], path=copy)] * 2) == [contents[3]] * 2
    with pytest.raises(UnreadableImage, match=r"nowhere\.png cannot be read \(No such file"):
        read_contents([*samples, replace(samples[3], path="nowhere.png")])


def test_a_survey_goes_on_after_damaged_files(tiny_data):
    paths = [sample.path for sample in read_folder(tiny_data)]
    for path, data in ((paths[2], b""), (paths[5], b"no image"), (paths[7], Path(paths[7]).read_bytes()[:-20])):
        Path(path).write_bytes(data)
    Path(paths[9]).unlink()
    errors = {i: str(c) for i, c in enumerate(survey(paths)) if isinstance(c, UnreadableImage)}
    assert set(errors) == {2, 5, 7, 9} and all(paths[i] in text for i, text in errors.items())
    assert "is empty" in errors[2] and "is not an image" in errors[5] and "truncated" in errors[7]
    assert "No such file" in errors[9]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_quality_of_a_jpeg(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 24, 3), dtype=np.uint8)
    for quality in (1, 10, 49, 50, 51, 75, 90, 95, 100):
        data = io.BytesIO()
        Image.fromarray(pixels).convert(mode).save(data, "JPEG", quality=quality)
        content = describe(data.getvalue(), "x")
        assert (content.quality, content.format, content.width, content.height) == (quality, "JPEG", 24, 40)
    assert jpeg_quality([2] * 64) > jpeg_quality([40] * 64)  # tables of other programs


def test_what_only_opencv_reads_has_a_content(tmp_path):
    """A PNG of 16 bits, which Pillow would clip."""
    grey = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / "deep.png"), grey)
    assert cv2.imwrite(str(tmp_path / "flat.png"), (grey >> 8).astype(np.uint8))
    deep, eight_bits = survey([str(tmp_path / "deep.png"), str(tmp_path / "flat.png")])
    assert deep.format == "PNG" and deep.width == 64 and deep.fingerprint != eight_bits.fingerprint
    assert deep.perceptual and deep.perceptual == eight_bits.perceptual


def test_what_only_pillow_reads_is_no_image(tmp_path):
    """Training could not read it later."""
    path = tmp_path / "a.png"
    Image.fromarray(np.zeros((40, 24, 3), np.uint8)).save(path, format="pcx")
    assert isinstance(survey([str(path)])[0], UnreadableImage)


@pytest.mark.parametrize(("cut", "message"), [(0, "is empty"), (9, "is truncated")])
def test_a_damaged_file_is_found_before_the_run(tiny_data, tiny_backbone, tmp_path, cut, message):
    path = tiny_data / "real" / "11.png"
    path.write_bytes(path.read_bytes()[:-cut])  # [:-0] is nothing
    with pytest.raises(UnreadableImage, match=f"11.png {message}"):
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    assert not (tmp_path / "run").exists()  # after a repair the same command works
