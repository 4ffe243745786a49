"""Crops of pictures and videos: faces as `masm prepare` cuts them, tiles, whole pictures; what gives no crop."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.crop_recipe import CropRecipe, read_recipe
from masm_detect.data.cutting import cut_file
from masm_detect.data.decode import read_image
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.prepare import prepare
from prepare_runs import BrightFaces
from trained_runs import face_photograph, write_rgb
from video_files import encode_video, write_image, write_video

FACES = CropRecipe("face", 32, 1.3, "bright-1", "largest")


def test_every_face_of_a_video_is_a_track(tmp_path):
    video = write_video(tmp_path / "v.avi", 20, dark=(0,))
    cut = cut_file(video, FACES, BrightFaces(), frames_per_video=5)
    assert (cut.kind, cut.wanted, cut.reason, cut.shape) == ("video", 5, None, (48, 64))
    assert cut.lost == [(0, "no face")]
    assert [c.frame for c in cut.crops] == [n for n in (5, 10, 14, 19) for _ in range(2)]
    assert {c.track for c in cut.crops} == {1, 2}
    assert [c.seconds for c in cut.crops[::2]] == pytest.approx([n / 25 for n in (5, 10, 14, 19)])
    largest = cut_file(video, FACES, BrightFaces(), faces="largest", frames_per_video=5)
    assert len(largest.crops) == 4 and {c.box for c in largest.crops} == {(16.0, 12.0, 48.0, 36.0)}
    assert {c.track for c in largest.crops} == {1}  # one score for the file, whoever is largest


def test_faces_are_cut_as_by_prepare(tmp_path):
    for kind in ("real", "fake-x"):
        write_rgb(tmp_path / "source" / kind / "a.png", face_photograph())
    prepare(tmp_path / "source", tmp_path / "out", dataset="d", size=64, workers=1, progress=False)
    written = read_image(tmp_path / "out" / "frames" / "real" / "a" / "000000.png")
    recipe = read_recipe(tmp_path / "out")
    (crop,) = cut_file(tmp_path / "source" / "real" / "a.png", recipe, MtcnnDetector(), faces=recipe.faces).crops
    assert crop.frame is None and crop.seconds is None and crop.track == 1
    assert np.array_equal(crop.rgb, written)


@pytest.mark.parametrize(
    ("height", "width", "most"),
    [
        (64, 64, 36),
        (100, 300, 36),
        (300, 100, 5),
        (31, 33, 9),
        (400, 500, 1),
        (600, 200, 1),
        (1200, 300, 2),
        (300, 60, 5),
    ],
)
def test_tiles_lie_inside_and_are_not_resampled(tmp_path, seed, height, width, most):
    rgb = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    cut = cut_file(write_rgb(tmp_path / "a.png", rgb), CropRecipe("tile", 28), tiles=most)
    assert 1 <= len(cut.crops) <= most
    boxes = [tuple(map(int, crop.box)) for crop in cut.crops]
    assert len(set(boxes)) == len(boxes)
    for (x0, y0, x1, y1), crop in zip(boxes, cut.crops):
        assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height and crop.rgb.shape == (28, 28, 3)
        assert np.array_equal(crop.rgb, rgb[y0:y1, x0:x1])


def test_whole_pictures_and_frames(tmp_path):
    picture = write_image(tmp_path / "a.png")
    (crop,) = cut_file(picture, None).crops
    assert crop.box is None and crop.track is None and np.array_equal(crop.rgb, read_image(picture))
    video = encode_video(tmp_path / "v.mp4", 9)
    assert [c.frame for c in cut_file(video, None, frames_per_video=3).crops] == [0, 4, 8]


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.png", b"", "a.png is empty"),
        ("a.jpg", b"no picture", "not an image"),
        ("a.mp4", b"no video at all", "not a video"),
        ("a.txt", b"text", r"\.txt is neither a picture nor a video"),
        ("a", b"text", "no suffix is neither"),
    ],
)
def test_what_gives_no_crop(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    cut = cut_file(tmp_path / name, None)
    assert cut.crops == []
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(cut.reason)
    assert str(tmp_path) not in cut.reason


def test_no_face_and_small_pictures_have_a_reason(tmp_path):
    assert cut_file(write_image(tmp_path / "dark.png", 0), FACES, BrightFaces()).reason == "no face"
    small = cut_file(write_image(tmp_path / "small.png"), CropRecipe("tile", 56))
    assert small.reason == "64x48 pixels, smaller than a tile of 56x56"


def test_sound_without_pictures(tmp_path):
    import av

    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert "no video stream" in cut_file(path, None).reason
