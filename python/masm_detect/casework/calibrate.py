"""`masm calibrate`: scores validation data with a run, and keeps in the run what they teach."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from masm_detect.data.contents import read_contents
from masm_detect.data.crop_recipe import check_same_crops
from masm_detect.data.frames import frame_dataset
from masm_detect.data.samples import Samples
from masm_detect.data.seen import seen_in_training
from masm_detect.data.sources import load_samples, read_splits
from masm_detect.evaluation.calibration import (
    MOST_FEATURES,
    Calibration,
    CalibrationError,
    check_rate,
    farthest_of,
    fit_calibration,
    save_calibration,
    unit_length,
)
from masm_detect.evaluation.metrics import video_scores
from masm_detect.evaluation.predict import predict_features
from masm_detect.provenance import provenance
from masm_detect.report.calibration import plot_reliability
from masm_detect.runtime import resolve_precision

from .detector import TrainedDetector


def calibrate(
    run: Path | str,
    paths: Sequence[str] = (),
    *,
    split: str | None = None,
    false_alarm_rate: float = 0.05,
    miss_rate: float = 0.05,
    method: Literal["platt", "temperature"] = "platt",
    outside_rate: float = 0.05,
    as_is: bool = False,
    device: str = "auto",
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto",
    workers: int | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Calibration:
    """Learn the calibration of a run, and write it to the run folder with a reliability plot.

    Args:
        run: folder written by `masm train`.
        paths: data sets with real and fake videos that were not trained on; empty: the validation split of the run.
        split: read this split of the data sets only, e.g. val; None: all.
        false_alarm_rate: largest share of real videos that may be called fake, e.g. 0.05. It needs 1 / rate - 1
            independent groups of real videos (19 for 0.05).
        miss_rate: largest share of fake videos that may be called real; it needs as many groups of fake videos.
        method: platt: a scale and an offset of the logit; temperature: a scale only.
        outside_rate: share of videos like these that may be called unlike the validation data.
        as_is: do not compare how the images were cut with how the training images were (crops.json).
        device: cpu, cuda, or auto.
        precision: bf16, fp16, fp32, or auto: bf16 if the device is fast at it.
        workers: processes that read the images, as runtime.workers of `masm train`.
        batch_size: images in a batch.
        progress: show a progress bar.

    Returns:
        The calibration.

    Raises:
        CalibrationError: the run was trained on some of the data, the data has one class only, or its scores are no
            better than chance.
        RecipeError: the data was cut differently from the training images, and `as_is` is not set.
    """
    check_rate("outside_rate", outside_rate)
    trained = TrainedDetector(run, device, calibrated=False)
    samples = _samples(trained, paths, split, as_is, progress)
    logits, features = predict_features(
        trained.detector,
        frame_dataset(samples, trained.detector.backbone, trained.config.data),
        batch_size=batch_size,
        precision=resolve_precision(precision, trained.device),
        workers=workers,
        progress="validation" if progress else None,
    )
    _, labels, scores, groups = video_scores(samples, torch.sigmoid(logits.double()).numpy())
    learned = fit_calibration(
        scores, labels, groups, false_alarm_rate=false_alarm_rate, miss_rate=miss_rate, method=method
    )
    kept = np.unique(np.linspace(0, len(samples) - 1, min(len(samples), MOST_FEATURES)).round().astype(int))
    units = unit_length(features.numpy())
    videos, group_names = [sample.video for sample in samples], [sample.group for sample in samples]
    images = np.unique(videos, return_counts=True)[1]
    learned = replace(
        learned,
        selected_on=not paths and trained.config.optim.select == "best",
        images_per_video=(int(images.min()), float(np.median(images))),
        farthest=farthest_of(units, videos, group_names, outside_rate, kept),
        outside_rate=outside_rate,
        data=tuple(sorted({sample.dataset for sample in samples})),
        features=units[kept],
    )
    save_calibration(run, learned, provenance(str(trained.device)) | {"split": split, "images": len(samples)})
    plot_reliability(labels, scores, learned, Path(run) / "plots" / "reliability.png")
    return learned


def _samples(trained: TrainedDetector, paths: Sequence[str], split: str | None, as_is: bool, progress: bool) -> Samples:
    if not paths:
        return read_splits(trained.config.data)["val"]
    if not as_is:
        check_same_crops(trained.recipe, paths, trained.run.name)
    samples = Samples(load_samples(list(paths), splits=None if split is None else [split]))
    seen = seen_in_training(trained.run, samples, read_contents(samples, progress))
    if seen is None or seen["files"] is None or seen["near_copies"] is None:
        warnings.warn(
            f"{trained.run} does not record all that it was trained on (an older version wrote it), so that training "
            "images among these data cannot be found",
            stacklevel=2,
        )
    if seen is not None and (seen["groups"] or seen["files"] or seen["near_copies"]):
        raise CalibrationError(
            f"{trained.run} was trained on {seen['groups']} of these {seen['of_groups']} groups and "
            f"{seen['files'] or 0} of these files, and {seen['near_copies'] or 0} others look like training images: "
            "calibrate on data that it has not seen, e.g. with --split val"
        )
    return samples
