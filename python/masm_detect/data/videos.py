"""The videos of a source folder, and evenly spread frames of each."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from masm_detect.data.decode import UnreadableImage, read_image
from masm_detect.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES, PrepareError
from masm_detect.data.walk import files_below, left_out, subfolders


@dataclass(frozen=True)
class VideoSource:
    """One video: a video file, or the images of a folder."""

    folder: str  # real or fake-<method>
    name: str
    files: tuple[Path, ...]

    @property
    def is_video(self) -> bool:
        """Whether it is a video file, not images."""
        return self.files[0].suffix.lower() in VIDEO_SUFFIXES

    @property
    def kind(self) -> str:
        """Either "images" (a single image) or "videos"."""
        return "images" if len(self.files) == 1 and not self.is_video else "videos"

    @property
    def key(self) -> str:
        """Unique name: folder/name."""
        return f"{self.folder}/{self.name}"


def find_videos(source: Path) -> list[VideoSource]:
    """The videos, frame folders and images of `real/` and `fake-<method>/`, sorted; PrepareError on another layout."""
    if not source.is_dir():
        raise PrepareError(f"{source} is not a folder")
    classes = subfolders(source)
    strangers = [c.name for c in classes if c.name != "real" and not (c.name.startswith("fake-") and len(c.name) > 5)]
    if strangers or not classes:
        raise PrepareError(f"{source}: expected folders real/ and fake-<method>/, found {strangers or 'none'}")
    found: list[VideoSource] = []
    ignored: list[str] = []
    for c in classes:
        frames: dict[str, list[Path]] = defaultdict(list)
        for file in files_below(c):
            suffix, place = file.suffix.lower(), file.relative_to(c)
            if suffix in IMAGE_SUFFIXES and place.parent != Path("."):
                frames[place.parent.as_posix()].append(file)
            elif suffix in IMAGE_SUFFIXES | VIDEO_SUFFIXES:
                found.append(VideoSource(c.name, place.with_suffix("").as_posix(), (file,)))
            else:
                ignored.append(str(file))
        found += [VideoSource(c.name, name, tuple(files)) for name, files in frames.items()]
    if ignored:
        warnings.warn(left_out(source, ignored), stacklevel=2)
    if not found:
        raise PrepareError(f"{source} holds no video and no image")
    twice = [key for key, n in Counter(v.key for v in found).items() if n > 1]
    if twice:
        raise PrepareError(
            f"{len(twice)} names occur twice (files that differ in their suffix only?), e.g. {twice[0]!r}"
        )
    return sorted(found, key=lambda v: v.key)


def frames_of(video: VideoSource, count: int) -> Iterator[tuple[int, int, np.ndarray | str | None]]:
    """`read_frames` of a video file or of a folder of images; an unreadable image is a reason (str) instead."""
    if video.is_video:
        yield from read_frames(video.files[0], count)
        return
    for number in spread(len(video.files), count):
        try:
            yield number, len(video.files), read_image(video.files[number])
        except UnreadableImage as error:
            # Only the name of the file: the report can be published without the folders of this machine.
            reason = str(error).replace(str(video.files[number]), video.files[number].name)
            yield number, len(video.files), f"unreadable image: {reason}"


def read_frames(path: Path, count: int) -> Iterator[tuple[int, int, np.ndarray | None]]:
    """(frame number, frames in the video, RGB uint8 [H, W, 3] or None if undecodable) of `count` spread frames.

    Frames are counted by reading the video once: the number in the container is often wrong, and seeking with it ends
    at another frame. Raises UnreadableImage if no frame can be read.
    """
    if path.stat().st_size == 0:
        raise UnreadableImage("empty file (0 bytes)")
    total = 0
    capture = _open(path)
    while capture.grab():
        total += 1
    capture.release()
    if total == 0:
        raise UnreadableImage("unreadable: no frame can be decoded")
    numbers = set(spread(total, count))
    capture = _open(path)
    for number in range(total):
        ok = capture.grab()
        if number in numbers:
            ok, bgr = capture.retrieve() if ok else (False, None)
            yield number, total, cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB) if ok and bgr is not None else None
    capture.release()


def spread(total: int, count: int) -> list[int]:
    """`count` numbers (or all) of 0..total-1, evenly spread, first and last included (for count >= 2)."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()


def count_note(video: VideoSource, total: int) -> str | None:
    """A note if the container of a video lists another number of frames than the `total` that can be read."""
    if not video.is_video:
        return None
    capture = _open(video.files[0])
    listed = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    capture.release()
    return f"the container lists {listed} frames, {total} can be read" if listed != total else None


def _open(path: Path) -> cv2.VideoCapture:
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise UnreadableImage("unreadable: not a video that OpenCV can open, or truncated")
    return capture
