"""Scores a detector on samples, and trained runs on data sets: one table, one JSON, one plot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .adapters import load_method
from .config import ConfigError, EvalConfig, TrainConfig, load_config, to_dict
from .data.contents import fingerprints
from .data.images import FrameDataset
from .data.loading import Batches, in_order
from .data.records import DatasetError, Sample, check_samples, limit_frames
from .metrics import evaluate_scores
from .models.detector import Detector, load_detector
from .results import check_output_folder, provenance, write_json
from .runtime import autocast, choose_attention, resolve_precision, set_up
from .sources import frame_dataset, load_samples, seen_in_training


@torch.inference_mode()
def predict(
    detector: Detector,
    dataset: FrameDataset,
    *,
    batch_size: int = 32,
    precision: str = "fp32",
    workers: int | None = None,
    progress: str | None = None,
) -> Tensor:
    """Logits [len(dataset)], float32 on the CPU, in the order of the data set. `workers` is that of
    `data.loading.Batches`, `progress` the label of a bar, or None.
    """
    device = next(detector.parameters()).device
    detector.eval()
    logits = []
    with tqdm(total=len(dataset), unit="img", desc=progress, disable=progress is None) as bar:
        for images, _ in Batches(dataset, in_order(len(dataset), batch_size), device, workers):
            with autocast(precision, device):
                logits.append(detector(images).float())
            bar.update(len(images))
        return torch.cat(logits).cpu()  # once: a copy a batch would wait for the GPU each time


def score_samples(detector: Detector, dataset: FrameDataset, **options: Any) -> np.ndarray:
    """P(fake) of each sample, float64 [len(dataset)]; options as of `predict`."""
    return torch.sigmoid(predict(detector, dataset, **options).double()).numpy()


def load_run(folder: Path | str, device: torch.device | str = "cpu") -> tuple[TrainConfig, Detector]:
    """The configuration and the trained detector of a run folder written by `masm train`."""
    folder = Path(folder)
    config = load_config(folder / "config.yaml")
    if not (folder / "adapter").is_dir():
        raise ConfigError(f"{folder} has no adapter/: its training has not ended (continue it with --resume)")
    detector = load_detector(config.model)
    load_method(detector, config.method, folder / "adapter")
    choose_attention(detector.backbone, torch.device(device))
    return config, detector.to(device)


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Score every run of `config` on its data sets and write results.json and auc.png to `config.out`.

    Returns the results: `{"provenance", "config", "runs": {run name: {"method", "seen_in_training",
    **metrics.evaluate_scores(...)}}}`; for "seen_in_training" see `sources.seen_in_training`.
    """
    from .report.plots import plot_auc

    if not config.runs:
        raise ConfigError("no run given: name at least one run folder")
    check_output_folder(config.out)
    device = set_up(config.runtime)
    samples = _samples(config)
    results: dict[str, Any] = {}
    files: list[str] = []
    for folder in config.runs:
        run, detector = load_run(folder, device)
        if not files:
            files = fingerprints(samples, config.runtime.progress)
        dataset = frame_dataset(samples, detector.backbone, run.data)
        scores = score_samples(
            detector,
            dataset,
            batch_size=config.runtime.eval_batch_size,
            precision=resolve_precision(config.runtime.precision, device),
            workers=config.runtime.workers,
            progress=Path(folder).name if config.runtime.progress else None,
        )
        metrics = evaluate_scores(
            samples, scores, n_bootstrap=config.n_bootstrap, seed=config.runtime.seed, protocol=config.protocol
        )
        name = _unique(Path(folder).resolve().name, results)
        results[name] = {
            "method": run.method.name,
            "seen_in_training": seen_in_training(Path(folder), samples, files),
            **metrics,
        }
    out = Path(config.out)
    content = {
        "provenance": provenance(config.runtime.device),
        "config": to_dict(replace(config, runs=[Path(run).name for run in config.runs])),
        "runs": results,
    }
    write_json(out / "results.json", content)
    plot_auc(results, out / "auc.png")
    return content


def _samples(config: EvalConfig) -> list[Sample]:
    samples = load_samples(
        config.paths,
        splits=None if config.split is None else [config.split],
        root=config.root,
        prefix_map=config.prefix_map,
        compression=config.compression,
        label_map=config.label_map,
        missing=config.missing,
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
