"""Writes small videos and images for tests."""

from __future__ import annotations

import cv2
import numpy as np


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
