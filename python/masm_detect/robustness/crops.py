"""Ready crops: distortions act on the crops themselves, those of videos on the frames of a video in their order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePath

import numpy as np
from torch import Tensor

from masm_detect.data.decode import read_image
from masm_detect.data.loading import in_order, worker_count
from masm_detect.data.sample import Sample, natural_key
from masm_detect.data.transforms import TransformError, transform_image
from masm_detect.distortions.registry import Cell
from masm_ext.progress import Progress

from .parts import Network, PartJournal, PartScores

#: Batches in a part: its decoded images are in memory together.
_BATCHES = 8
ONE_FRAME = "its video has one frame only"
SIZES = "the frames of its video differ in size"


def score_crops(
    samples: Sequence[Sample],
    cells: Sequence[Cell],
    network: Network,
    journal: PartJournal,
    *,
    seed: int,
    workers: int | None = None,
    progress: bool = True,
) -> None:
    """Add to `journal` the scores of all samples in all cells that it does not have yet.

    Args:
        samples: n images.
        cells: the distortions.
        network: what scores them.
        journal: of this examination.
        seed: of the random distortions.
        workers: threads that distort the images; None: as of `data.loading.worker_count`.
        progress: show a progress bar.

    Raises:
        UnreadableImage: a file is absent or damaged.
        TransformError: an image that is not distorted is too small for the network's centre crop.
    """
    frames = _Frames(samples)
    threads = worker_count(workers, network.trained.device)
    parts = in_order(len(samples), network.batch_size * _BATCHES)
    total = len(samples) * len(cells)
    with (
        ThreadPoolExecutor(max(1, threads)) as pool,
        Progress(total=total, unit="img", desc="robustness", disable=not progress) as bar,
    ):
        for number, part in enumerate(parts):
            todo = [cell for cell in cells if (number, cell.name) not in journal.done]
            bar.update(len(part) * (len(cells) - len(todo)))
            if todo:
                frames.load(part, any(cell.video for cell in todo))
            for cell in todo:
                result = PartScores(number, cell.name)
                inputs = _inputs(part, cell, frames, network, seed, pool if threads > 1 else None, result)
                logits = network.logits(inputs)
                result.rows = [(index, float(z), None, None, None) for index, z in zip(_scored(result), logits)]
                journal.add_scores(result)
                bar.update(len(part))
            frames.forget(part)


def _scored(result: PartScores) -> list[int]:
    lost = {index for index, _ in result.lost}
    return [index for index in result.wanted if index not in lost]


def _inputs(
    part: Sequence[int],
    cell: Cell,
    frames: _Frames,
    network: Network,
    seed: int,
    pool: ThreadPoolExecutor | None,
    result: PartScores,
) -> Iterator[Tensor]:
    """The distorted images of a part as input of the network, in order; `result` gets what becomes of the others."""
    places = []
    for index in part:
        reason = frames.obstacle(index) if cell.video else None
        if reason == ONE_FRAME:
            result.skipped.append((index, reason))
            continue
        result.wanted.append(index)
        if reason is not None:
            result.lost.append((index, reason))
        else:
            places.append(index)

    def make(index: int) -> tuple[Tensor | str, bool]:
        rgb = frames.rgb(index)
        made = frames.encoded(index, cell) if cell.video else cell.image(rgb, seed, frames.key(index))
        same = made is rgb or (made.shape == rgb.shape and np.array_equal(made, rgb))
        try:
            return transform_image(made, network.trained.transform, None, frames.samples[index].path), same
        except TransformError as error:
            if cell.distortion is None:
                raise
            return str(error).replace(frames.samples[index].path, "the distorted image"), same

    # a clip is encoded once for all of its frames, by one thread
    made = map(make, places) if pool is None or cell.video else pool.map(make, places)
    for index, (image, same) in zip(places, made):
        if isinstance(image, str):
            result.lost.append((index, image))
            continue
        if same and cell.distortion is not None:
            result.unchanged.append(index)
        yield image


class _Frames:
    """The decoded images of the current part, and of the videos that it is in the middle of."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        places: dict[str, list[int]] = defaultdict(list)
        for index, sample in enumerate(samples):
            places[sample.video].append(index)
        self._videos = {
            video: sorted(indices, key=lambda i: natural_key(samples[i].path)) for video, indices in places.items()
        }
        self._rgb: dict[int, np.ndarray] = {}
        self._encoded: dict[tuple[str, str], dict[int, np.ndarray]] = {}  # (cell, video) -> frames not used yet

    def load(self, part: Sequence[int], with_videos: bool) -> None:
        """Decode the images of a part; `with_videos`: also the other frames of their videos."""
        needed: Iterable[int] = part
        if with_videos:
            videos = dict.fromkeys(self.samples[index].video for index in part)
            needed = dict.fromkeys([*part, *(i for v in videos if len(self._videos[v]) > 1 for i in self._videos[v])])
        for index in needed:
            if index not in self._rgb:
                self._rgb[index] = read_image(self.samples[index].path)

    def forget(self, part: Sequence[int]) -> None:
        """Drop what no later part needs: a video is kept up to its last image."""
        for video in {self.samples[index].video for index in part}:
            if max(self._videos[video]) <= part[-1]:
                for index in self._videos[video]:
                    self._rgb.pop(index, None)
                for key in [key for key in self._encoded if key[1] == video]:
                    del self._encoded[key]

    def rgb(self, index: int) -> np.ndarray:
        """A decoded image, uint8 [H, W, 3]."""
        return self._rgb[index]

    def key(self, index: int) -> str:
        """What the random draws of an image depend on: its video and its name, not the folder of the data set."""
        sample = self.samples[index]
        return f"{sample.video}/{PurePath(sample.path).name}"

    def obstacle(self, index: int) -> str | None:
        """Why the video of an image cannot be encoded, or None."""
        places = self._videos[self.samples[index].video]
        if len(places) < 2:
            return ONE_FRAME
        return SIZES if len({self._rgb[place].shape for place in places}) > 1 else None

    def encoded(self, index: int, cell: Cell) -> np.ndarray:
        """An image after its whole video was encoded."""
        video = self.samples[index].video
        frames = self._encoded.setdefault((cell.name, video), {})
        if index not in frames:
            places = self._videos[video]
            frames.update(zip(places, cell.clip([self._rgb[place] for place in places])))
        return frames.pop(index)
