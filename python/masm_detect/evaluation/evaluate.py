"""Scores trained runs on data sets: one table, one JSON, one plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from masm_detect.config import ConfigError, EvalConfig
from masm_detect.config_files import to_dict
from masm_detect.data.checks import check_samples
from masm_detect.data.content_cache import Content
from masm_detect.data.contents import read_contents
from masm_detect.data.copies import check_contents
from masm_detect.data.crop_recipe import check_same_crops, read_recipe
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import DatasetError, Sample, limit_frames
from masm_detect.data.samples import Samples
from masm_detect.data.seen import seen_in_training
from masm_detect.data.sources import load_samples
from masm_detect.provenance import provenance
from masm_detect.report.plots import plot_auc
from masm_detect.results import check_output_folder, write_json
from masm_detect.runtime import process_settings, resolve_precision

from .metrics import evaluate_scores
from .predict import score_samples
from .runs import load_run


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Score every run of `config` on its data sets and write results.json and auc.png to `config.out`.

    torch's settings of the process (`runtime.process_settings`) are restored at the end.

    Args:
        config: runs, data sets and output folder.

    Returns:
        The content of results.json: {"provenance", "config", "runs": {run name: {"method", "seen_in_training",
        **`metrics.evaluate_scores`}}}; "seen_in_training" is that of `data.seen.seen_in_training`.

    Raises:
        ConfigError: no run, a folder that is no finished run, no data, or `config.out` holds results and
            `config.overwrite` is not set.
        RecipeError: the images were cut differently from the training images of a run, and `config.as_is` is not set.
        DatasetError: a data set that holds one class only, or a file that is in two splits or real and fake, byte for
            byte.
        UnreadableImage: a file is absent or damaged.
    """
    if not config.runs:
        raise ConfigError("runs is empty: name at least one run folder written by `masm train`")
    check_output_folder(config.out)
    if (Path(config.out) / "results.json").exists() and not config.overwrite:
        raise ConfigError(f"{config.out} already holds results: give another --out, or --overwrite to replace them")
    with process_settings(config.runtime) as device:
        results = _score_runs(config, device)
        content = {
            "provenance": provenance(str(device)),
            "config": to_dict(replace(config, runs=[Path(run).name for run in config.runs])),
            "runs": results,
        }
    write_json(Path(config.out) / "results.json", content)
    plot_auc(results, Path(config.out) / "auc.png")
    return content


def _score_runs(config: EvalConfig, device: torch.device) -> dict[str, Any]:
    samples = Samples(_samples(config))
    results: dict[str, Any] = {}
    contents: list[Content] = []
    for folder in config.runs:
        if not config.as_is:
            check_same_crops(read_recipe(folder), config.paths, Path(folder).name)
        run, detector = load_run(folder, device)
        if not contents:
            contents = read_contents(samples, config.runtime.progress)
            check_contents(samples, contents)
        scores = score_samples(
            detector,
            frame_dataset(samples, detector.backbone, run.data),
            batch_size=config.runtime.eval_batch_size,
            precision=resolve_precision(config.runtime.precision, device),
            workers=config.runtime.workers,
            progress=Path(folder).name if config.runtime.progress else None,
        )
        name = _unique(Path(folder).resolve().name, results)
        results[name] = {
            "method": run.method.name,
            "seen_in_training": seen_in_training(Path(folder), samples, contents),
            **evaluate_scores(samples, scores, protocol=config.protocol),
        }
    return results


def _samples(config: EvalConfig) -> list[Sample]:
    samples = load_samples(
        config.paths,
        splits=None if config.split is None else [config.split],
        root=config.root,
        prefix_map=config.prefix_map,
        compression=config.compression,
        label_map=config.label_map,
        video_pattern=config.video_pattern,
        missing=config.missing,
        hf=config.hf,
    )
    samples = limit_frames(samples, config.frames_per_video)
    check_samples(samples)
    for dataset in sorted({sample.dataset for sample in samples}):
        labels = {sample.label for sample in samples if sample.dataset == dataset}
        if len(labels) == 1:
            raise DatasetError(
                f"all samples of the data set {dataset!r} are {'fake' if 1 in labels else 'real'}: an AUC needs both "
                "classes in each data set; leave it out, or put it into one folder or file with the other class"
            )
    return samples


def _unique(name: str, taken: dict[str, Any]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
