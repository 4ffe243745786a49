"""`prepare` with several faces in a frame: every person, or the one under the mask."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.data.decode import read_image
from masm_detect.data.deepfakebench import read_deepfakebench
from masm_detect.data.faces import Face
from masm_detect.data.sample import PrepareError
from PIL import Image
from prepare_runs import run
from video_files import write_video


class TwoFaces:
    """A fake detector that finds two faces. The right one is larger."""

    name = "two"

    def detect(self, rgb, smallest=None):
        return [Face((2, 10, 22, 30), None, 0.9), Face((36, 8, 60, 32), None, 0.8)]


def source_of(tmp_path):
    write_video(tmp_path / "source" / "real" / "000.avi", 6)
    write_video(tmp_path / "source" / "fake-X" / "000_003.avi", 6)
    return tmp_path / "source"


def masks_of(tmp_path, **boxes):
    """A mask for each frame: bright in the box (x0, x1)."""
    for number, (x0, x1) in enumerate(boxes.values()):
        mask = np.zeros((48, 64), np.uint8)
        mask[12:28, x0:x1] = 255
        path = tmp_path / "masks" / "fake-X" / "000_003" / f"{number}.png"
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
    report = run(source, tmp_path / "out", faces="mask", masks=masks_of(tmp_path, a=(4, 20), b=(4, 20)),
                 detector=TwoFaces())  # fmt: skip
    assert [(x.video, x.reason) for x in report.lost_videos] == [("fake-X/000_003", "its masks: 2 for 6 frames")]
    write_video(source / "fake-X" / "001.avi", 3)
    with pytest.raises(PrepareError, match=r"no mask for 1 forged videos, e\.g\. 'fake-X/001'"):
        run(source, tmp_path / "out", faces="mask", masks=tmp_path / "masks", detector=TwoFaces())
