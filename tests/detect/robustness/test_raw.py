"""`masm robustness` on raw pictures and videos: distortions before the faces are found, and what they cost in faces."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from masm_detect.config import ConfigError, EvalConfig, RuntimeConfig
from masm_detect.data.crop_recipe import CropRecipe, write_recipe
from masm_detect.data.faces import ARCFACE_TEMPLATE, Face
from masm_detect.data.sample import DatasetError
from masm_detect.data.video_reader import VideoFile
from masm_detect.distortions.registry import Cell
from masm_detect.robustness import raw
from masm_detect.robustness import robustness as module
from masm_detect.robustness.robustness import RobustnessConfig, robustness
from trained_runs import tiny_run, write_rgb
from video_files import encode_video, striped

RUNTIME = RuntimeConfig(device="cpu", progress=False)
RECIPE = CropRecipe("face", 32, 1.3, "bright pixels", "largest")


class BrightFaces:
    """Finds a face in every frame that is bright enough."""

    name = "bright pixels"

    def detect(self, rgb, smallest=None):
        if rgb.mean() < 60:
            return []
        points = np.array(ARCFACE_TEMPLATE) / 112 * 40 + 4
        return [Face((4.0, 4.0, 44.0, 44.0), points, 1.0)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.setattr("masm_detect.data.content_cache.default_cache_file", lambda: folder / "contents.sqlite")
        return tiny_run(folder, RECIPE)


@pytest.fixture
def run(trained, monkeypatch):
    monkeypatch.setattr(module, "MtcnnDetector", BrightFaces)
    return trained


@pytest.fixture
def data(tmp_path, seed):
    random, folder = np.random.default_rng(seed), tmp_path / "raw"
    for kind in ("real", "fake-x"):
        encode_video(folder / kind / f"{kind}-clip.mp4", 30)
        for number in range(2):
            noise = random.integers(0, 256, (60, 70, 3), dtype=np.uint8)
            write_rgb(folder / kind / f"{kind}-{number}.png", noise)
    return folder


def examine(run, data, out, cells, frames=4, **options):
    config = EvalConfig(runs=[str(run)], paths=[str(data)], out=str(out), runtime=RUNTIME, frames_per_video=frames)
    return robustness(config, RobustnessConfig(cells=cells, **options))["datasets"]["raw"]["cells"]


def rows(out, cell):
    with open(out / "scores.csv") as file:
        return [row for row in csv.DictReader(file) if f"{row['distortion']}:{row['level']}".rstrip(":") == cell]


def test_faces_that_a_distortion_costs_are_counted(run, data, tmp_path):
    clean, mild, strong = examine(run, data, tmp_path / "out", "contrast:1,contrast:5")
    # two videos of four frames and four pictures; at 0.35 of the brightness nothing is bright enough
    assert (clean["wanted"], clean["scored"], mild["scored"]) == (12, 12, 12)
    assert (strong["wanted"], strong["scored"], strong["coverage"]) == (12, 0, 0.0)
    assert strong["lost"] == {"no face": 12} and strong["auc"] is None and strong["flips"]["share"] is None
    assert (clean["videos_wanted"], strong["videos_wanted"], strong["videos_scored"]) == (6, 6, 0)
    clip = [row for row in rows(tmp_path / "out", "clean") if row["file"].endswith("real-clip.mp4")]
    assert [row["frame"] for row in clip] == ["0", "10", "19", "29"] and {row["track"] for row in clip} == {"1"}


def test_a_clip_is_the_frames_around_the_scored_one(run, data, tmp_path, monkeypatch):
    clips, real = [], Cell.clip
    monkeypatch.setattr(Cell, "clip", lambda cell, frames: clips.append([*frames]) or real(cell, frames))
    cells = examine(run, data, tmp_path / "out", "h264:30,hevc:35", frames=3)
    for cell in cells[1:]:
        assert (cell["wanted"], cell["scored"]) == (6, 6) and cell["skipped"] == {"a single picture": 4}
        assert cell["difference"]["n"] == 6 and cell["unchanged"] == 0
    # frames 0, 14 (of 0 to 29: 14.5 rounds to even) and 29, each with up to 8 before and 3 behind
    assert [len(clip) for clip in clips[::2][:3]] == [4, 12, 9]
    [first] = VideoFile(data / "fake-x" / "fake-x-clip.mp4").frames([0])
    assert np.array_equal(clips[0][0], first.rgb)


def test_each_frame_is_decoded_once(run, data, tmp_path, monkeypatch):
    read, real = [], VideoFile.frames

    def watch(video, numbers):
        read.append(sorted(numbers))
        return real(video, numbers)

    monkeypatch.setattr(VideoFile, "frames", watch)
    examine(run, data, tmp_path / "out", "noise,blur:1,h264:30", frames=2)
    assert read == [[*range(0, 4), *range(21, 30)]] * 2  # one pass a video


def test_a_cell_depends_on_no_other_cell(run, data, tmp_path):
    examine(run, data, tmp_path / "a", "noise:3,noise:4,h264:30")
    examine(run, data, tmp_path / "b", "noise:4")
    assert rows(tmp_path / "a", "noise:4") == rows(tmp_path / "b", "noise:4")
    assert rows(tmp_path / "a", "clean") == rows(tmp_path / "b", "clean")


def test_unreadable_files_are_listed(run, data, tmp_path):
    (data / "real" / "broken.mp4").write_bytes(b"no video")
    (data / "fake-x" / "broken.png").write_bytes(b"no picture")
    clean, blurred = examine(run, data, tmp_path / "out", "blur:1")
    for cell in (clean, blurred):
        assert (cell["wanted"], cell["scored"], cell["videos_wanted"], cell["videos_scored"]) == (13, 12, 8, 6)
        assert sum(cell["files_lost"].values()) == 1 and list(cell["lost"].values()) == [1]
    assert "broken" in next(iter(clean["lost"])) or "unreadable" in next(iter(clean["lost"]))


def test_pictures_are_raw_on_demand_and_tiles_are_cut(run, tmp_path, seed):
    random = np.random.default_rng(seed)
    for kind in ("real", "fake-x"):
        write_rgb(tmp_path / "raw" / kind / f"{kind}.png", random.integers(0, 256, (60, 90, 3), dtype=np.uint8))
    run = Path(shutil.copytree(run, tmp_path / "run"))
    write_recipe(run, CropRecipe("tile", 28))
    clean, small = examine(run, tmp_path / "raw", tmp_path / "out", "thumbnail:128,resize:50", raw=True)[:2]
    assert clean["scored"] == 2 and len(rows(tmp_path / "out", "clean")) == 12  # 2 x 3 tiles of 28 px
    assert small["cell"] == "resize:50"


def test_frame_folders_are_videos(run, tmp_path):
    for kind in ("real", "fake-x"):
        for number in range(12):
            write_rgb(tmp_path / "raw" / kind / f"{kind}-clip" / f"{number}.png", striped((64, 48), number))
    clean, coded = examine(run, tmp_path / "raw", tmp_path / "out", "h264:30", frames=2, raw=True)
    assert clean["scored"] == coded["scored"] == 4
    assert {row["file"].rsplit("/", 1)[-1] for row in rows(tmp_path / "out", "h264:30")} == {"0.png", "11.png"}


def test_mistakes(run, data, tmp_path):
    for path in (data / "fake-x").iterdir():
        path.unlink()
    with pytest.raises(DatasetError, match="reals only"):
        examine(run, data, tmp_path / "out", "blur")
    with pytest.raises(ConfigError, match="is no folder"):
        raw.raw_material([str(tmp_path / "absent")])
