"""The videos of a source folder, and which frames of each are taken."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from masm_detect.data.decode import UnreadableImage, read_image
from masm_detect.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES, PrepareError
from masm_detect.data.video_reader import Frame, VideoFile
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
        raise PrepareError(
            f"{source}: expected only folders real/ and fake-<method>/, found {strangers or 'none'}: rename or move "
            "what is something else"
        )
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
    keys = {video.key for video in found}
    inside = [(v.key, above) for v in found for above in _above(v.key) if above in keys]
    if inside:
        raise PrepareError(
            f"{len(inside)} videos are in a folder with the name of another video, where the crops of both would mix, "
            f"e.g. {inside[0][0]!r} and {inside[0][1]!r}: rename one of them"
        )
    return sorted(found, key=lambda v: v.key)


def _above(key: str) -> list[str]:
    """The folders that a key is in: a/b for a/b/c."""
    parts = key.split("/")
    return ["/".join(parts[:n]) for n in range(2, len(parts))]


def open_video(video: VideoSource) -> VideoFile | ImageFrames:
    """The frames of a video file, or of a folder of images; UnreadableImage for a file that is no video."""
    return VideoFile(video.files[0]) if video.is_video else ImageFrames(video.files)


class ImageFrames:
    """The images of a folder, read as the frames of a video: `total`, `notes` and `frames` as of `VideoFile`.

    Attributes:
        names: of the files, without suffix; numbers without leading zeros
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._files, self.total, self.notes = files, len(files), []
        self.names = [str(int(f.stem)) if f.stem.isdecimal() else f.stem for f in files]

    def frames(self, numbers: Collection[int]) -> Iterator[Frame]:
        """The images with these numbers, in order; an unreadable one has a problem instead of a picture."""
        for number in sorted(set(numbers)):
            file = self._files[number]
            try:
                yield Frame(number, None, read_image(file))
            except UnreadableImage as error:
                # Only the name of the file: the report can be published without the folders of this machine.
                yield Frame(number, None, None, f"unreadable image: {str(error).replace(str(file), file.name)}")


def spread(total: int, count: int) -> list[int]:
    """`count` numbers (or all) of 0..total-1, evenly spread, first and last included (for count >= 2)."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int)).tolist()
