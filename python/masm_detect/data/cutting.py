"""The crops of pictures and videos: the faces that a detector finds, tiles, or the whole picture.

`masm prepare` cuts data sets with it, `masm predict` cuts what is to be scored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import cv2
import numpy as np

from masm_detect.data.crop_recipe import TILES, CropRecipe
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.faces import FaceDetector, align_crop
from masm_detect.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from masm_detect.data.tracking import FaceChooser, Faces, Person
from masm_detect.data.video_reader import Frame, VideoFile
from masm_detect.data.videos import ImageFrames, spread

#: `largest` finds small faces, too, where there is no large one. `all` must find faces of every size in one search: in
#: a picture of more pixels than 4K, faces below this share of its shorter side are not looked for.
_SMALLEST_SHARE = 1 / 50


@dataclass(frozen=True)
class Crop:
    """A crop to be scored.

    Attributes:
        frame: number of the frame in a video, from 0; None for a picture
        seconds: its time from the start of the video; None: unknown
        track: number of the person, from 1; None: the whole picture, or a tile
        box: (x0, y0, x1, y1) in pixels of the frame; None: the whole picture
        rgb: uint8 [H, W, 3]
    """

    frame: int | None
    seconds: float | None
    track: int | None
    box: tuple[float, float, float, float] | None
    rgb: np.ndarray


@dataclass
class CutFile:
    """What became of a file.

    Attributes:
        file: its path
        kind: image or video
        crops: what is to be scored
        wanted: number of frames that were to be read
        lost: (frame, reason) for each that gave no crop
        reason: why the file gave no crop at all, or None
        notes: what is unusual about it
        shape: (H, W) of the last frame that was read, or None
    """

    file: str
    kind: Literal["image", "video"]
    crops: list[Crop] = field(default_factory=list)
    wanted: int = 0
    lost: list[tuple[int, str]] = field(default_factory=list)
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    shape: tuple[int, int] | None = None


def cut_faces(
    frames: Iterable[Frame],
    chooser: FaceChooser,
    masks: Iterable[Callable[[], np.ndarray | None] | str],
    size: int,
    scale: float,
) -> Iterator[tuple[Frame, str | list[tuple[Person, np.ndarray]]]]:
    """Each frame with its faces, cut out as RGB uint8 [size, size, 3], or with the reason why it has none.

    Args:
        frames: of one video, in order.
        chooser: finds and chooses the faces.
        masks: for each frame, as `FaceChooser.choose` takes it, or why the frame is left out.
        size: side of a crop in pixels.
        scale: size of a crop relative to the face.
    """
    for frame, mask in zip(frames, masks):
        people = frame.problem or (mask if isinstance(mask, str) else chooser.choose(frame.rgb, mask))
        if isinstance(people, str):
            yield frame, people
        else:
            yield frame, [(person, align_crop(frame.rgb, person.face, size, scale)) for person in people]


def cut_file(
    path: Path,
    recipe: CropRecipe | None,
    detector: FaceDetector | None = None,
    *,
    faces: Faces = "all",
    frames_per_video: int = 32,
    tiles: int = TILES,
) -> CutFile:
    """The crops of one picture or video. A file that cannot be read has none, and a reason.

    Args:
        path: the file.
        recipe: how it is cut; None: every frame as it is.
        detector: the face detector, for the region face.
        faces: all: every face of a frame, each person a track of its own; largest: one face of a frame.
        frames_per_video: most frames of a video, evenly spread.
        tiles: most tiles of a frame, for the region tile.

    Returns:
        The crops, and every frame without one with the reason.
    """
    suffix = path.suffix.lower()
    video = suffix in VIDEO_SUFFIXES
    cut = CutFile(str(path), "video" if video else "image")
    if not video and suffix not in IMAGE_SUFFIXES:
        cut.reason = f"{suffix or 'no suffix'} is neither a picture nor a video that can be read"
        return cut
    try:
        opened = VideoFile(path) if video else ImageFrames([path])
        cut.notes += opened.notes
        numbers = spread(opened.total, frames_per_video)
        cut.wanted = len(numbers)
        frames = _noting_shape(opened.frames(numbers), cut)
        for frame, crops in _cut_frames(frames, recipe, detector, faces, tiles):
            if isinstance(crops, str):
                cut.lost.append((frame.number, crops))
                continue
            number = frame.number if video else None
            cut.crops += [Crop(number, frame.seconds, track, box, rgb) for track, box, rgb in crops]
    except UnreadableImage as error:
        cut.reason = str(error).replace(str(path), path.name)
    except OSError as error:
        cut.reason = f"cannot be read ({error.strerror or error})"
    if not cut.crops and cut.reason is None:
        reasons = sorted({reason for _, reason in cut.lost})
        cut.reason = reasons[0] if len(reasons) == 1 else f"no frame could be used: {'; '.join(reasons)}"
    return cut


def cut_in_worker(*arguments: object, **options: object) -> CutFile:
    """`cut_file` in a process beside others."""
    cv2.setNumThreads(1)
    return cut_file(*arguments, **options)


#: Track, box and pixels, as in `Crop`.
Region = tuple[int | None, tuple[float, float, float, float] | None, np.ndarray]


def _cut_frames(
    frames: Iterable[Frame], recipe: CropRecipe | None, detector: FaceDetector | None, faces: Faces, tiles: int
) -> Iterator[tuple[Frame, str | list[Region]]]:
    cutter = FrameCutter(recipe, detector, faces, tiles)
    for frame in frames:
        yield frame, cutter.cut(frame)


class FrameCutter:
    """Cuts the frames of one picture or video, in order; arguments as of `cut_file`."""

    def __init__(
        self, recipe: CropRecipe | None, detector: FaceDetector | None = None, faces: Faces = "all", tiles: int = TILES
    ) -> None:
        self._recipe, self._tiles, self._faces = recipe, tiles, faces
        face = recipe is not None and recipe.region == "face"
        self._chooser = FaceChooser(detector, faces, _SMALLEST_SHARE) if face else None

    def cut(self, frame: Frame) -> str | list[Region]:
        """The regions of the next frame, or why it has none."""
        if self._chooser is not None:
            size, scale = self._recipe.size, self._recipe.scale
            [(_, people)] = cut_faces([frame], self._chooser, _no_masks(), size, scale)
            if isinstance(people, str):
                return people
            # `largest` is one face a frame, as in `masm prepare`, and gives one score for the whole video
            return [(p.number if self._faces == "all" else 1, p.face.box, rgb) for p, rgb in people]
        if frame.problem:
            return frame.problem
        return [(None, None, frame.rgb)] if self._recipe is None else _tiles(frame.rgb, self._recipe.size, self._tiles)


def _no_masks() -> Iterator[Callable[[], None]]:
    while True:
        yield lambda: None


def _tiles(rgb: np.ndarray, size: int, most: int) -> str | list[Region]:
    """At most `most` squares of a picture, evenly spread and not resampled, or why there is none."""
    height, width = rgb.shape[:2]
    if min(height, width) < size:
        return f"{width}x{height} pixels, smaller than a tile of {size}x{size}"
    # rows and columns in the shape of the picture, as many as fit side by side
    rows = min(most, height // size, max(1, round((most * height / width) ** 0.5)))
    columns = min(width // size, max(1, most // rows))
    tops, lefts = (np.linspace(0, side - size, n).round().astype(int) if n > 1 else [(side - size) // 2]
                   for side, n in ((height, rows), (width, columns)))  # fmt: skip
    return [
        # a copy: a view would keep the whole frame in memory
        (
            None,
            tuple(map(float, (left, top, left + size, top + size))),
            rgb[top : top + size, left : left + size].copy(),
        )
        for top in tops
        for left in lefts
    ]


def _noting_shape(frames: Iterable[Frame], cut: CutFile) -> Iterator[Frame]:
    for frame in frames:
        if frame.rgb is not None:
            cut.shape = frame.rgb.shape[:2]
        yield frame
