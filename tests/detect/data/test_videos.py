"""Source folders and the frames of a video."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.videos import read_frames, spread


def write_video(path, frames, dark=(), fourcc="MJPG"):
    """Frames whose grey level is 120 + 2 * number, or 0 where `dark`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*fourcc), 25, (64, 48))
    assert writer.isOpened()
    for i in range(frames):
        writer.write(np.full((48, 64, 3), 0 if i in dark else 120 + 2 * i, np.uint8))
    writer.release()
    return path


def write_image(path, level=200):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full((48, 64, 3), level, np.uint8))
    return path


def test_truncated_mp4(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20, fourcc="mp4v")
    path.write_bytes(path.read_bytes()[:-400])  # the index at the end is gone
    with pytest.raises(UnreadableImage, match="unreadable"):
        list(read_frames(path, 4))


def test_spread():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 32) == [0, 1, 2]
    assert spread(5, 1) == [0]
