"""Source folders and the frames of a video."""

from __future__ import annotations

import pytest
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.videos import read_frames, spread
from video_files import write_video


def test_truncated_mp4(tmp_path):
    path = write_video(tmp_path / "a.mp4", 20, fourcc="mp4v")
    path.write_bytes(path.read_bytes()[:-400])  # the index at the end is gone
    with pytest.raises(UnreadableImage, match="unreadable"):
        list(read_frames(path, 4))


def test_spread():
    assert spread(10, 4) == [0, 3, 6, 9]
    assert spread(3, 32) == [0, 1, 2]
    assert spread(5, 1) == [0]
