"""Spectra tell sets of another resizing history apart, and not two halves of one set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from masm_detect.data.folders import read_folder
from masm_detect.doctor.spectrum import radial_spectrum, spectrum_report
from pictures import picture
from PIL import Image

COUNT = 30


def write_set(folder: Path, seed: int, small: int | None, kind: str = "real") -> None:
    """Pictures with sensor noise; `small`: shrunk to this side and enlarged again."""
    (folder / kind).mkdir(parents=True)
    for i in range(COUNT):
        random = np.random.default_rng(seed + i)
        pixels = np.asarray(picture(seed + i), dtype=float) + random.normal(0, 8, (192, 192, 3))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if small is not None:
            image = image.resize((small, small), Image.Resampling.BICUBIC).resize((192, 192), Image.Resampling.BICUBIC)
        image.save(folder / kind / f"{folder.name}{kind}{i}.png")


def test_real_images_of_two_histories_are_told_apart(tmp_path):
    write_set(tmp_path / "a", 0, None)
    write_set(tmp_path / "b", 100, None)
    write_set(tmp_path / "c", 200, 120)
    write_set(tmp_path / "c", 300, 120, "fake-x")
    samples = [sample for name in "abc" for sample in read_folder(tmp_path / name)]
    report, problems = spectrum_report(samples, [], limit=25)
    aucs = {(row["a"], row["b"]): row["auc"] for row in report["between_reals"]}
    assert aucs["a", "b"] < 0.75 and aucs["a", "c"] > 0.9 and aucs["b", "c"] > 0.9
    assert all(row["n"] == [25, 25] for row in report["between_reals"])
    assert {"a and c", "b and c"} <= {p.message.split("real images of ")[1].split(" are")[0] for p in problems}
    [fakes] = report["real_against_fake"]
    assert (fakes["dataset"], fakes["method"]) == ("c", "x") and fakes["auc"] < 0.75
    assert spectrum_report(samples, [], limit=25)[0] == report  # seeded
    assert spectrum_report(samples, [], limit=25, seed=1)[0] != report
    alone, _ = spectrum_report(samples[: 2 * COUNT], [], limit=25)  # the same images are drawn without the third set
    assert alone["between_reals"] == report["between_reals"][:1]


def test_copies_are_kept_in_one_fold(tmp_path):
    """A picture of both sets is never scored by a classifier that knows it as one of the other set."""
    write_set(tmp_path / "a", 0, None)
    write_set(tmp_path / "b", 0, None)
    samples = read_folder(tmp_path / "a") + read_folder(tmp_path / "b")
    report, problems = spectrum_report(samples, [(i, i + COUNT) for i in range(COUNT)], limit=COUNT)
    assert report["between_reals"][0]["auc"] == 0.5 and problems == []
    apart, _ = spectrum_report(samples, [], limit=COUNT)
    assert apart["between_reals"][0]["auc"] < 0.3  # a copy with the other label misleads


def test_the_rings_of_a_wave():
    """A wave of 16 periods has its power in ring 16."""
    wave = 128 + 100 * np.sin(2 * np.pi * 16 * np.arange(128) / 128)
    rgb = np.repeat(np.tile(wave, (96, 1)).astype(np.uint8)[:, :, None], 3, axis=2)
    spectrum = radial_spectrum(rgb)
    assert spectrum.shape == (48,) and abs(int(spectrum.argmax()) - 16) <= 1
