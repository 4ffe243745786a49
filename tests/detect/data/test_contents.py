"""Every file is read once: damaged ones are found before a run."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
from masm_detect.data.contents import fingerprints
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.folders import read_folder
from masm_detect.training.run import train
from tiny import run_config


def test_fingerprints_are_of_the_bytes_in_the_order_of_the_samples(tiny_data):
    samples = read_folder(tiny_data)
    prints = fingerprints(samples)
    assert len(set(prints)) == len(prints) == 24 and all(len(p) == 16 for p in prints)
    assert fingerprints(samples[::-1]) == prints[::-1] and fingerprints([]) == []
    copy = samples[3].path + ".copy.png"
    shutil.copy(samples[3].path, copy)
    assert fingerprints([replace(samples[3], path=copy)]) == [prints[3]]
    with pytest.raises(UnreadableImage, match=r"nowhere\.png cannot be read \(No such file"):
        fingerprints([*samples, replace(samples[3], path="nowhere.png")])


@pytest.mark.parametrize(("cut", "message"), [(0, "is empty"), (9, "is truncated")])
def test_a_damaged_file_is_found_before_the_run(tiny_data, tiny_backbone, tmp_path, cut, message):
    path = tiny_data / "real" / "11.png"
    path.write_bytes(path.read_bytes()[:-cut])  # [:-0] is nothing
    with pytest.raises(UnreadableImage, match=f"11.png {message}"):
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    assert not (tmp_path / "run").exists()  # after a repair the same command works
