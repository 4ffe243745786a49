"""`prepare` with several faces in a frame: every person, or the one under the mask."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from masm_detect.data.decode import read_image
from masm_detect.data.deepfakebench import read_deepfakebench
from masm_detect.data.faces import Face
from masm_detect.data.prepare_video import RECORD
from masm_detect.data.sample import PrepareError
from PIL import Image
from prepare_runs import run
from video_files import write_video


class TwoFaces:
    """A fake detector that finds two faces. The right one is larger."""

    name = "two"

    def detect(self, rgb, smallest=None):
        return [Face((2, 10, 22, 30), None, 0.9), Face((36, 8, 60, 32), None, 0.8)]


def source_of(tmp_path, images=()):
    """A real video and a forged one, which is a folder of `images` if there are any."""
    if images:
        for name in images:
            path = tmp_path / "source" / "fake-X" / "000_003" / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(path)
        write_video(tmp_path / "source" / "real" / "000.avi", 6)
        return tmp_path / "source"
    write_video(tmp_path / "source" / "real" / "000.avi", 6)
    write_video(tmp_path / "source" / "fake-X" / "000_003.avi", 6)
    return tmp_path / "source"


def masks_of(tmp_path, **boxes):
    """Masks by their names, after their first letter: bright in the box (x0, x1)."""
    for name, (x0, x1) in boxes.items():
        mask = np.zeros((48, 64), np.uint8)
        mask[12:28, x0:x1] = 255
        path = tmp_path / "masks" / "fake-X" / "000_003" / f"{name[1:]}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(path)
    return tmp_path / "masks"


def test_every_person_becomes_a_video(tmp_path):
    report = run(source_of(tmp_path), tmp_path / "out", faces="all", detector=TwoFaces())
    assert report.frames_written == 8 and report.by_method["real"]["several_faces"] == 1
    samples = read_deepfakebench(report.json_path)
    assert {s.video.split("/", 2)[2] for s in samples} == {"000/face1", "000/face2", "000_003/face1", "000_003/face2"}
    assert len(samples) == 16
    # the fake is in one group with its original, as without faces=all
    assert len({s.group for s in samples}) == 1
    assert run(source_of(tmp_path), tmp_path / "out", faces="all", detector=TwoFaces()).frames_written == 8


def test_the_face_under_the_mask(tmp_path):
    left = {f"f{n}": (4, 20) for n in range(6)}
    report = run(source_of(tmp_path), tmp_path / "out", faces="mask", masks=masks_of(tmp_path, **left),
                 detector=TwoFaces())  # fmt: skip
    assert report.frames_written == 8 and not report.lost_frames
    largest = run(source_of(tmp_path), tmp_path / "largest", detector=TwoFaces())
    for method, same in (("real", True), ("X", False)):
        one, other = (
            [read_image(s.path) for s in read_deepfakebench(r.json_path) if s.method == method]
            for r in (report, largest)
        )
        assert all(np.array_equal(a, b) for a, b in zip(one, other)) is same


def test_masks_of_real_videos_do_not_matter(tmp_path):
    masks = masks_of(tmp_path, **{f"f{n}": (4, 20) for n in range(6)})
    write_video(masks / "real" / "000.avi", 6, dark=range(6))
    report = run(source_of(tmp_path), tmp_path / "out", faces="mask", masks=masks, detector=TwoFaces())
    assert report.frames_written == 8 and not report.lost_videos


def test_no_face_under_the_mask(tmp_path):
    boxes = {f"f{n}": (4, 20) if n else (26, 32) for n in range(6)}
    report = run(source_of(tmp_path), tmp_path / "out", faces="mask", masks=masks_of(tmp_path, **boxes),
                 detector=TwoFaces())  # fmt: skip
    assert [(x.video, x.frame, x.reason) for x in report.lost_frames] == [
        ("fake-X/000_003", 0, "no face under the mask")
    ]


def test_masks_that_do_not_fit(tmp_path):
    source = source_of(tmp_path)
    report = run(source, tmp_path / "out", faces="mask", masks=masks_of(tmp_path, f0=(4, 20), f1=(4, 20)),
                 detector=TwoFaces())  # fmt: skip
    assert [(x.video, x.reason) for x in report.lost_videos] == [
        ("fake-X/000_003", "its masks cannot be paired: 2 masks for 6 frames")
    ]
    write_video(source / "fake-X" / "001.avi", 3)
    with pytest.raises(PrepareError, match=r"no mask for 1 forged videos, e\.g\. 'fake-X/001'"):
        run(source, tmp_path / "out", faces="mask", masks=tmp_path / "masks", detector=TwoFaces())


def faces_of(report):
    """Name of the frame -> place of its face, of the forged video."""
    frames = Path(report.json_path).parent / "frames" / "fake-X" / "000_003"
    return {crop["file"]: crop["box"][0] for crop in json.loads((frames / RECORD).read_text())["crops"]}


def test_masks_belong_to_the_frames_of_their_names(tmp_path):
    """Frames 7, 8 and 10; the masks are in another order, one has leading zeros, one is missing, one is too many."""
    source = source_of(tmp_path, images=("007", "008", "010"))
    masks = masks_of(tmp_path, f3=(4, 20), f10=(40, 56), f0007=(4, 20), f99=(4, 20))
    report = run(source, tmp_path / "out", faces="mask", masks=masks, detector=TwoFaces())
    assert faces_of(report) == {"000000.png": 2.0, "000002.png": 36.0}
    assert [(x.frame, x.reason) for x in report.lost_frames] == [(1, "no mask of this name")]


def test_a_video_of_masks(tmp_path):
    source = source_of(tmp_path)
    path = tmp_path / "masks" / "fake-X" / "000_003.mkv"
    path.parent.mkdir(parents=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "gray"
        for number in range(6):
            mask = np.zeros((48, 64), np.uint8)
            mask[12:28, 4:20] = 255 * (number < 3)
            mask[12:28, 40:56] = 255 * (number >= 3)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(mask, format="gray")))
        container.mux(stream.encode(None))
    report = run(source, tmp_path / "out", faces="mask", masks=tmp_path / "masks", detector=TwoFaces())
    assert {int(name[:6]) < 3: x for name, x in faces_of(report).items()} == {True: 2.0, False: 36.0}
    assert len(faces_of(report)) == 4 and not report.lost_frames and report.readers


def test_damaged_masks_lose_their_frames(tmp_path):
    source = source_of(tmp_path, images=("0", "1", "2"))
    masks = masks_of(tmp_path, f0=(4, 20), f1=(4, 20), f2=(4, 20))
    (masks / "fake-X" / "000_003" / "1.png").write_bytes(b"no picture")
    report = run(source, tmp_path / "out", faces="mask", masks=masks, detector=TwoFaces())
    [loss] = report.lost_frames
    assert loss.frame == 1 and loss.reason.startswith("unreadable mask: unreadable image")


@pytest.mark.parametrize(("frames", "masks", "reason"), [
    (("7", "007", "8"), ("f7", "f8"), "two images are called '7'"),
    (("0", "1", "2"), ("f1", "f2", "f3"), r"of other names (frames '0' to '2'; masks '1' to '3')"),
])  # fmt: skip
def test_masks_that_cannot_be_paired(tmp_path, frames, masks, reason):
    source = source_of(tmp_path, images=frames)
    folder = masks_of(tmp_path, **{name: (4, 20) for name in masks})
    report = run(source, tmp_path / "out", faces="mask", masks=folder, detector=TwoFaces())
    [loss] = report.lost_videos
    assert loss.video == "fake-X/000_003" and reason in loss.reason
