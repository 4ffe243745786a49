"""A trained run that scores pictures and videos as its training images were cut: `masm_detect.load_detector`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import joblib
import numpy as np
import torch

from masm_detect.config import Precision, TrainConfig
from masm_detect.data.crop_recipe import TILES, CropRecipe, read_recipe
from masm_detect.data.cutting import CutFile, cut_file, cut_in_worker
from masm_detect.data.faces import FaceDetector
from masm_detect.data.frames import image_transform
from masm_detect.data.loading import worker_count
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.tracking import Faces
from masm_detect.data.transforms import TransformError, transform_image
from masm_detect.evaluation.calibration import Calibration, Verdict, load_calibration, unit_length
from masm_detect.evaluation.runs import load_run
from masm_detect.evaluation.score_file import ScoreRow, sigmoid
from masm_detect.methods.adapters import base_sha256
from masm_detect.models.detector import Detector, new_detector
from masm_detect.runtime import autocast, resolve_device, resolve_precision
from masm_ext.progress import Progress

from .files import PredictError, find_files

#: A person who was seen in a smaller share of the scored frames does not decide about a file: false faces appear in
#: single frames, and a person who is lost and found again is counted as two.
_SEEN = 0.25
#: Files that each process cuts ahead of the network: crops, or whole frames.
_AHEAD, _AHEAD_WHOLE = 4, 1


@dataclass(frozen=True)
class ScoreOptions:
    """How files are cut and scored.

    Attributes:
        as_is: score every picture and frame as it is: it is a crop already
        faces: all: every face of a frame, each person with a score; largest: one face of a frame, one score for the
            file; null: as the training images were cut (all if masks chose them)
        frames_per_video: most frames of a video, evenly spread
        tiles: most tiles of a picture, if the run was trained on tiles
        batch_size: images in a batch
        precision: bf16, fp16, fp32 or auto (bf16 if the device is fast at it)
        workers: processes that read and cut files; None: 0 on the CPU, on CUDA one less than the usable cores
    """

    as_is: bool = False
    faces: Literal["all", "largest"] | None = None
    frames_per_video: int = 32
    tiles: int = TILES
    batch_size: int = 32
    precision: Precision = "auto"
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.faces not in ("all", "largest", None):
            raise PredictError(f"faces is {self.faces!r}; it must be all or largest")
        if self.precision not in ("auto", "bf16", "fp16", "fp32"):
            raise PredictError(f"precision is {self.precision!r}; it must be auto, bf16, fp16 or fp32")
        if self.workers is not None and self.workers < 0:
            raise PredictError(f"workers is {self.workers}; it must be 0 or more")
        for name in ("frames_per_video", "tiles", "batch_size"):
            if getattr(self, name) < 1:
                raise PredictError(f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclass
class FileScore:
    """The result of one file.

    Attributes:
        file: the path
        kind: image or video
        rows: of its scored images
        p_fake: of the file: the mean over the frames of the person with the largest mean; None: no image was scored
        track: the person who decided; None: whole pictures or tiles, or nobody was seen in enough frames, so that all
            images decide
        deciding: persons who were seen in enough frames to decide
        calibrated: calibrated P(fake); None: the run is not calibrated
        verdict: likely fake, likely real or unsure; uncalibrated if the run is not; None: no image was scored
        distance: mean distance of the features of its images to those of validation images; None: not calibrated
        outside: whether that is farther than validation videos are: then the verdict is unsure, whatever the score
        wanted: frames that were to be read
        scored: frames that gave an image
        lost: (frame, reason) of the others
        reason: why nothing was scored, or None
        notes: what is unusual about the file
        cut: the crops, if they were requested
    """

    file: str
    kind: str
    rows: list[ScoreRow] = field(default_factory=list, repr=False)
    p_fake: float | None = None
    track: int | None = None
    deciding: int = 1
    calibrated: float | None = None
    verdict: Verdict | None = None
    distance: float | None = None
    outside: bool = False
    wanted: int = 0
    scored: int = 0
    lost: list[tuple[int, str]] = field(default_factory=list)
    reason: str | None = None
    notes: list[str] = field(default_factory=list)
    cut: CutFile | None = field(default=None, repr=False)

    @property
    def deciding_rows(self) -> list[ScoreRow]:
        """The rows whose mean is `p_fake`."""
        return [row for row in self.rows if self.track is None or row.track == self.track]

    @property
    def tracks(self) -> dict[int | None, float]:
        """Person -> mean P(fake) over the frames; None for whole pictures and tiles."""
        scores = defaultdict(list)
        for row in self.rows:
            scores[row.track].append(row.p_fake)
        return {track: float(np.mean(values)) for track, values in scores.items()}


class TrainedDetector:
    """The detector of a run folder, with the crops that it was trained on and its calibration.

    Args:
        run: folder written by `masm train`.
        device: cpu, cuda, or auto.
        calibrated: False leaves the calibration unread, for a run that is to be calibrated.

    Attributes:
        run: the folder
        config: of the run
        detector: the model, in eval mode
        recipe: how its training images were cut; None: not recorded
        calibration: None: `masm calibrate` was not run
        device: where it computes
        transform: from a crop to the input of the network
    """

    def __init__(self, run: Path | str, device: str = "auto", *, calibrated: bool = True) -> None:
        self.run, self.device = Path(run), resolve_device(device)
        self.config: TrainConfig
        self.detector: Detector
        self.config, self.detector = load_run(self.run, self.device)
        self.detector.eval()
        self.recipe: CropRecipe | None = read_recipe(self.run)
        self.calibration: Calibration | None = load_calibration(self.run) if calibrated else None
        self.transform = image_transform(self.detector.backbone, self.config.data)

    @cached_property
    def base_sha256(self) -> str:
        """SHA-256 of the pretrained backbone that the run names, which the adapter is bound to."""
        return base_sha256(new_detector(self.config.model))

    def predict(
        self, paths: Sequence[str | Path] | str | Path, *, progress: bool = False, **options: Any
    ) -> list[FileScore]:
        """Score pictures, videos, and all of them below folders.

        Args:
            paths: files and folders.
            progress: show a progress bar.
            options: of `ScoreOptions`.

        Returns:
            One result for each file, in order. A file that cannot be read, or shows no face, has a reason and no score.

        Raises:
            PredictError: a path does not exist, a folder holds no picture and no video, or the run does not record how
                its training images were cut and `as_is` is not set.
        """
        return list(self.score_files(find_files(paths), ScoreOptions(**options), progress=progress))

    def score_files(
        self,
        files: Sequence[Path],
        options: ScoreOptions,
        *,
        progress: bool = False,
        keep_crops: bool = False,
    ) -> Iterator[FileScore]:
        """The result of each file, in order, as soon as it is known; batches run across files.

        Args:
            files: pictures and videos (`find_files`).
            options: how they are cut and scored.
            progress: show a progress bar.
            keep_crops: put the crops into the results.

        Raises:
            PredictError: as of `predict`.
        """
        recipe = None if options.as_is else self.needed_recipe()
        faces = MtcnnDetector() if recipe is not None and recipe.region == "face" else None
        if faces is not None:
            check_detector(recipe, faces, self.run.name)
        waiting: list[tuple[FileScore, CutFile]] = []
        with Progress(total=len(files), unit="file", desc="predict", disable=not progress) as bar:
            for cut in self._cut(files, recipe, faces, options):
                result = FileScore(cut.file, cut.kind, wanted=cut.wanted, lost=cut.lost, reason=cut.reason)
                result.notes = cut.notes
                waiting.append((result, cut))
                if sum(len(c.crops) for _, c in waiting) >= options.batch_size:
                    scored = list(self._scored(waiting, options, keep_crops))
                    bar.update(len(waiting))  # before the caller works on them
                    yield from scored
                    waiting, scored = [], []  # their crops would stay in memory while the next files are cut
            scored = list(self._scored(waiting, options, keep_crops))
            bar.update(len(waiting))
            yield from scored

    def score_images(
        self, images: Sequence[np.ndarray], batch_size: int = 32, precision: str = "auto"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Scores of crops.

        Args:
            images: n crops, RGB uint8 [H, W, 3].
            batch_size: images in a batch.
            precision: bf16, fp16, fp32 or auto.

        Returns:
            Logits [n] and features [n, feature_dim], float32.
        """
        precision = resolve_precision(precision, self.device)
        logits, features = [], []
        with torch.inference_mode():
            for start in range(0, len(images), batch_size):
                batch = torch.stack([transform_image(i, self.transform) for i in images[start : start + batch_size]])
                with autocast(precision, self.device):
                    z, f = self.detector(batch.to(self.device), return_features=True)
                logits.append(z.float().cpu().numpy())
                features.append(f.float().cpu().numpy())
        if not logits:
            return np.empty(0, np.float32), np.empty((0, self.detector.backbone.feature_dim), np.float32)
        return np.concatenate(logits), np.concatenate(features)

    def needed_recipe(self) -> CropRecipe:
        """How files are cut; raises PredictError if the run does not record it."""
        if self.recipe is None:
            raise PredictError(
                f"{self.run} does not record how its training images were cut (crops.json, which `masm prepare` writes "
                "beside them): give --as-is if your files are crops like them already"
            )
        return self.recipe

    def _cut(
        self, files: Sequence[Path], recipe: CropRecipe | None, faces: FaceDetector | None, options: ScoreOptions
    ) -> Iterator[CutFile]:
        kinds = {"faces": faces_of(recipe, options), "frames_per_video": options.frames_per_video}
        kinds["tiles"] = options.tiles
        ahead = _AHEAD_WHOLE if recipe is None else _AHEAD
        workers = min(worker_count(options.workers, self.device), len(files))
        if workers < 2:
            yield from (cut_file(file, recipe, faces, **kinds) for file in files)
            return
        # In portions: a process goes on cutting though the network is behind, and crops would fill the memory.
        remaining = iter(files)
        with joblib.Parallel(n_jobs=workers, return_as="generator", batch_size=1, max_nbytes=None) as parallel:
            while portion := list(islice(remaining, workers * ahead)):
                try:
                    yield from parallel(joblib.delayed(cut_in_worker)(file, recipe, faces, **kinds) for file in portion)
                except BrokenProcessPool as error:
                    raise PredictError(
                        f"a process was killed, perhaps because the {workers} of them had too little memory: give "
                        "fewer workers, and repeat the command"
                    ) from error

    def _scored(
        self,
        waiting: Sequence[tuple[FileScore, CutFile]],
        options: ScoreOptions,
        keep_crops: bool,
    ) -> Iterator[FileScore]:
        for _, cut in waiting:
            self._drop_unfit(cut)
        images = [crop.rgb for _, cut in waiting for crop in cut.crops]
        logits, found = self.score_images(images, options.batch_size, options.precision)
        place = 0
        for result, cut in waiting:
            own = slice(place, place + len(cut.crops))
            place = own.stop
            if not np.isfinite(logits[own]).all():
                result.reason = "the network gave a score that is not a number"
                yield result
                continue
            result.reason = cut.reason
            for crop, logit in zip(cut.crops, logits[own].tolist()):
                result.rows.append(
                    ScoreRow(cut.file, logit, sigmoid(logit), frame=crop.frame, seconds=crop.seconds, track=crop.track,
                             box=crop.box)
                )  # fmt: skip
            result.scored = len({crop.frame for crop in cut.crops})
            result.cut = cut if keep_crops else None
            self._judge(result, found[own])
            yield result

    def _drop_unfit(self, cut: CutFile) -> None:
        """Move crops that the transform refuses (smaller than a centre crop) to the lost frames."""
        if self.transform.crop != "center":  # every image can be resized
            return
        fit = []
        for crop in cut.crops:
            try:
                transform_image(crop.rgb, self.transform, name="the image")
            except TransformError as error:
                cut.lost.append((crop.frame or 0, str(error)))
            else:
                fit.append(crop)
        if cut.crops and not fit:
            cut.reason = cut.lost[-1][1]
        cut.crops = fit

    def _judge(self, result: FileScore, features: np.ndarray) -> None:
        if not result.rows:
            return
        result.track, result.p_fake, result.deciding = deciding_track(result.rows)
        if self.calibration is None:
            result.verdict = "uncalibrated"
            return
        result.calibrated = self.calibration.probability(result.p_fake)
        result.verdict = self.calibration.verdict(result.p_fake)
        deciding = [result.track is None or row.track == result.track for row in result.rows]
        distance = self.calibration.distance(unit_length(features[deciding]))
        if distance is not None:
            result.distance = float(distance.mean())
            result.outside = self.calibration.farthest is not None and result.distance >= self.calibration.farthest
        if result.outside:
            result.verdict = "unsure"


def deciding_track(rows: Sequence[ScoreRow]) -> tuple[int | None, float, int]:
    """The person with the largest mean P(fake), that mean, and how many persons were seen in enough frames to decide.

    If nobody was, the mean of all images decides, and the person is None.
    """
    scores: dict[int | None, list[float]] = defaultdict(list)
    for row in rows:
        scores[row.track].append(row.p_fake)
    frames = len({row.frame for row in rows})
    means = {track: float(np.mean(s)) for track, s in scores.items() if len(s) >= _SEEN * frames}
    if not means:
        return None, float(np.mean([row.p_fake for row in rows])), 1
    track = max(means, key=means.__getitem__)
    return track, means[track], len(means)


def faces_of(recipe: CropRecipe | None, options: ScoreOptions) -> Faces:
    """Which faces are cut: what `options` names, else as the training images were."""
    if options.faces is not None:
        return options.faces
    return "largest" if recipe is not None and recipe.faces == "largest" else "all"


def check_detector(recipe: CropRecipe, faces: FaceDetector, run: str) -> None:
    """Raise PredictError if the faces of the run called `run` were found by another detector than `faces`."""
    if recipe.detector != faces.name:
        raise PredictError(
            f"the training faces of {run} were found by {recipe.detector}, this version has {faces.name}: cut the "
            "files with the same detector and give --as-is"
        )


def load_detector(run: Path | str, device: str = "auto") -> TrainedDetector:
    """The trained detector of a run folder, ready to score pictures and videos.

    Args:
        run: folder written by `masm train`.
        device: cpu, cuda, or auto.

    Raises:
        ConfigError: the folder holds no finished run, or the device does not exist.
        CheckpointError, AdapterError: the adapter does not fit the backbone.
    """
    return TrainedDetector(run, device)
