"""Raw pictures and videos: a distortion acts on the whole frame, before faces are found in it and cut.

A video codec sees more than the frames that are scored: each of them is encoded with the `BEFORE` frames before and
the `BEHIND` frames behind it as one clip, which starts with a key frame.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from masm_detect.config import ConfigError
from masm_detect.data.crop_recipe import CropRecipe
from masm_detect.data.cutting import FrameCutter
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.faces import FaceDetector
from masm_detect.data.groups import with_name_groups
from masm_detect.data.sample import VIDEO_SUFFIXES, DatasetError, Sample
from masm_detect.data.transforms import TransformError, transform_image
from masm_detect.data.video_reader import Frame
from masm_detect.data.videos import VideoSource, find_videos, open_video, spread
from masm_detect.data.walk import files_below
from masm_detect.distortions.registry import Cell
from masm_ext.progress import Progress

from .parts import Network, PartJournal, PartScores

#: Frames before and behind a scored one in its clip.
BEFORE, BEHIND = 8, 3
#: Crops of a cell that are scored together. Few, because the crops of every cell wait in memory.
_BATCH = 8
ONE_PICTURE = "a single picture"


def holds_videos(path: str) -> bool:
    """Whether a folder holds a video file."""
    return Path(path).is_dir() and any(file.suffix.lower() in VIDEO_SUFFIXES for file in files_below(Path(path)))


def raw_material(paths: Sequence[str], split: str | None = None) -> tuple[list[VideoSource], list[Sample]]:
    """The pictures, videos and frame folders below `real/` and `fake-<method>/`, and a sample for each of them.

    Args:
        paths: folders; each is a data set.
        split: the folders are in this subfolder of each; None: directly in it.

    Raises:
        ConfigError, DatasetError, PrepareError: no folder, one class only, or another layout.
    """
    files: list[VideoSource] = []
    samples: list[Sample] = []
    for path in paths:
        folder = Path(path) if split is None else Path(path) / split
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder: raw material lies in real/ and fake-<method>/ of a folder")
        dataset, found = Path(path).resolve().name, find_videos(folder)
        if any(sample.dataset == dataset for sample in samples):
            raise ConfigError(f"two folders of raw material are called {dataset!r}: rename one of them")
        own = [
            Sample(
                str(one.files[0] if len(one.files) == 1 else one.files[0].parent),
                int(one.folder != "real"),
                dataset,
                one.folder.removeprefix("fake-"),
                f"{dataset}/{one.key}",
            )
            for one in found
        ]
        if len({sample.label for sample in own}) < 2:
            raise DatasetError(f"{folder} holds {'fakes' if own[0].label else 'reals'} only: an AUC needs both classes")
        files += found
        samples += with_name_groups(own)
    return files, samples


def score_raw(
    files: Sequence[VideoSource],
    samples: Sequence[Sample],
    cells: Sequence[Cell],
    network: Network,
    journal: PartJournal,
    recipe: CropRecipe | None,
    faces: FaceDetector | None,
    *,
    frames_per_video: int,
    tiles: int,
    seed: int,
    progress: bool = True,
) -> None:
    """Add to `journal` the scores of all files in all cells that it does not have yet.

    Args:
        files: F files, each a part.
        samples: one for each file.
        cells: the distortions.
        network: what scores the crops.
        journal: of this examination.
        recipe: how a frame is cut; None: as it is.
        faces: finds the faces, for the region face; the largest of a frame is cut.
        frames_per_video: most frames of a video, evenly spread.
        tiles: most tiles of a frame, for the region tile.
        seed: of the random distortions.
        progress: show a progress bar; its unit is a file in a cell.
    """
    total = len(files) * len(cells)
    with Progress(total=total, unit="file", desc="robustness", disable=not progress) as bar:
        for number, file in enumerate(files):
            todo = [cell for cell in cells if (number, cell.name) not in journal.done]
            bar.update(len(cells) - len(todo))
            if todo:
                cuts = {cell.name: FrameCutter(recipe, faces, "largest", tiles) for cell in todo}
                one = _RawFile(number, file, samples[number], todo, cuts, network, seed)
                for result in one.scores(frames_per_video):
                    journal.add_scores(result)
                    bar.update()


class _RawFile:
    """One file in several cells: decoded once, distorted and cut for each cell."""

    def __init__(
        self,
        number: int,
        file: VideoSource,
        sample: Sample,
        cells: Sequence[Cell],
        cutters: dict[str, FrameCutter],
        network: Network,
        seed: int,
    ) -> None:
        self._file, self._sample, self._cells, self._cutters = file, sample, cells, cutters
        self._network, self._seed = network, seed
        self._results = {cell.name: PartScores(number, cell.name) for cell in cells}
        self._waiting: dict[str, list[tuple[Tensor, tuple[Any, ...]]]] = {cell.name: [] for cell in cells}

    def scores(self, frames_per_video: int) -> list[PartScores]:
        """What became of the file in each cell."""
        numbers: deque[int] = deque()
        try:
            opened = open_video(self._file)
            numbers.extend(spread(opened.total, frames_per_video))
            clip = opened.total > 1 and any(cell.video for cell in self._cells)
            before, behind = (BEFORE, BEHIND) if clip else (0, 0)
            last = opened.total - 1
            needed = {k for n in numbers for k in range(max(0, n - before), min(last, n + behind) + 1)}
            held: dict[int, Frame] = {}
            for frame in opened.frames(needed):
                held[frame.number] = frame
                while numbers and frame.number >= min(last, numbers[0] + behind):
                    number = numbers.popleft()
                    window = [held[k] for k in range(number - before, number + behind + 1) if k in held]
                    self._frame(held[number], window, opened.total)
                    start = numbers[0] - before if numbers else last
                    held = {k: one for k, one in held.items() if k >= start}
        except UnreadableImage as error:
            self._lose(numbers, str(error).replace(str(self._file.files[0]), self._file.files[0].name))
        except OSError as error:
            self._lose(numbers, f"cannot be read ({error.strerror or error})")
        for cell in self._cells:
            self._flush(cell.name)
        return list(self._results.values())

    def _lose(self, numbers: Sequence[int], reason: str) -> None:
        """The file cannot be opened, or not read from the frame numbers[0] on."""
        for result in self._results.values():
            result.wanted += numbers
            result.lost += [(number, reason) for number in numbers]
            result.reason = None if result.wanted else reason

    def _frame(self, frame: Frame, window: Sequence[Frame], total: int) -> None:
        """One frame in every cell. `window`: the frames of its clip."""
        for cell in self._cells:
            result, number = self._results[cell.name], frame.number
            if cell.video and total == 1:
                result.skipped.append((number, ONE_PICTURE))
                continue
            result.wanted.append(number)
            if frame.problem:
                result.lost.append((number, frame.problem))
                continue
            made = self._distorted(cell, frame, window)
            if cell.distortion is not None and made.shape == frame.rgb.shape and np.array_equal(made, frame.rgb):
                result.unchanged.append(number)
            regions = self._cutters[cell.name].cut(Frame(number, frame.seconds, made))
            if isinstance(regions, str):
                result.lost.append((number, regions))
                continue
            try:
                inputs = [transform_image(rgb, self._network.trained.transform, None, "a crop") for *_, rgb in regions]
            except TransformError as error:
                result.lost.append((number, str(error)))
                continue
            for (track, box, _), image in zip(regions, inputs):
                place = (number, frame.seconds, track, None if box is None else [float(value) for value in box])
                self._waiting[cell.name].append((image, place))
            if len(self._waiting[cell.name]) >= _BATCH:
                self._flush(cell.name)

    def _distorted(self, cell: Cell, frame: Frame, window: Sequence[Frame]) -> np.ndarray:
        if not cell.video:
            return cell.image(frame.rgb, self._seed, f"{self._sample.video}/{frame.number}")
        # damaged frames, and pictures of another size in a folder of frames, are no part of the clip
        clip = [one for one in window if one.rgb is not None and one.rgb.shape == frame.rgb.shape]
        return cell.clip([one.rgb for one in clip])[[one.number for one in clip].index(frame.number)]

    def _flush(self, cell: str) -> None:
        waiting, self._waiting[cell] = self._waiting[cell], []
        logits = self._network.logits(image for image, _ in waiting)
        self._results[cell].rows += [
            (number, float(logit), seconds, track, box)
            for (_, (number, seconds, track, box)), logit in zip(waiting, logits)
        ]
