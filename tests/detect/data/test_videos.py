"""Source folders: which frames of a video are taken, and folders of images in place of a video."""

from __future__ import annotations

from masm_detect.data.videos import ImageFrames, spread
from video_files import write_image


def test_spread():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 32) == [0, 1, 2]
    assert spread(5, 1) == [0]


def test_images_as_frames(tmp_path):
    files = [write_image(tmp_path / f"{n}.png", level=10 * n) for n in range(4)]
    files[2].write_bytes(b"")
    images = ImageFrames(files)
    frames = list(images.frames([3, 0, 2]))
    assert (images.total, images.notes) == (4, []) and [frame.number for frame in frames] == [0, 2, 3]
    assert frames[1].rgb is None and frames[1].problem.startswith("unreadable image: 2.png is empty")
    assert frames[2].rgb[0, 0].tolist() == [30, 30, 30] and frames[2].seconds is None
