"""A training run: from a configuration to a folder that holds everything about it.

```
config.yaml  crops.json  environment.json  groups.json  metrics.json  history.jsonl  plots/*.png
adapter/  last/ (checkpoint)
```
`train` is `loop.fit` plus files. A program with samples of its own calls `fit`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from masm_detect.config import ConfigError, TrainConfig
from masm_detect.config_files import load_config, save_config, to_dict
from masm_detect.data.content_cache import Content
from masm_detect.data.contents import read_contents
from masm_detect.data.copies import check_contents
from masm_detect.data.crop_recipe import recipe_of, write_recipe
from masm_detect.data.frames import FrameDataset, frame_dataset
from masm_detect.data.samples import Samples
from masm_detect.data.seen import write_groups
from masm_detect.data.sources import read_splits
from masm_detect.distributed import Processes, processes
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.launch import is_restarted
from masm_detect.methods.adapters import base_sha256, save_method
from masm_detect.methods.build import build_method, resolve
from masm_detect.methods.method import Method
from masm_detect.models.detector import Detector, new_detector
from masm_detect.provenance import provenance
from masm_detect.report.plots import plot_drift, plot_history, plot_masks
from masm_detect.results import check_output_folder, write_json
from masm_detect.runtime import process_settings, resolve_precision

from .calibration import calibration_on
from .loop import FitResult, fit
from .trackers import Trackers, check_trackers


@dataclass
class RunResult:
    """A finished run: its folder, its detector with the chosen weights, and what training reported."""

    folder: Path
    detector: Detector
    method: Method
    fit: FitResult
    metrics: dict[str, Any]


def train(config: TrainConfig) -> RunResult:
    """Train as `config` says and write the run folder `config.out`.

    torch's settings of the process (`runtime.process_settings`) are restored at the end.

    Args:
        config: all settings of the run.

    Returns:
        The run with its trained detector.

    Raises:
        ConfigError: the folder holds another run, or `config.resume` is set and it holds none; the data sets were cut
            differently, and `config.data.as_is` is not set; or a tracker is not known or installed.
        DatasetError: the data cannot be used (`data.sources.read_splits`), or a file is in two splits or real and fake,
            byte for byte (`data.copies.check_contents`).
        UnreadableImage: a file is absent or damaged.
        Interrupted, TrainingError: as `loop.fit`.
    """
    folder = Path(config.out)
    config = replace(config, method=resolve(config.method))
    check_trackers(config.runtime.trackers)
    with process_settings(config.runtime) as device, processes(device) as ranks:
        if is_restarted() and (folder / "config.yaml").is_file():  # by the launcher, with the same command
            config = replace(config, resume=True)
        started = _check_folder(folder, config)
        ranks.wait()  # before the first process writes into it
        if not ranks.is_first:
            config = replace(config, runtime=replace(config.runtime, progress=False))
        return _train(config, folder, started, device, ranks)


def _train(config: TrainConfig, folder: Path, started: bool, device: torch.device, ranks: Processes) -> RunResult:
    runtime = config.runtime
    recipe = None if config.data.as_is else recipe_of(config.data.paths)
    splits = read_splits(config.data)
    train_samples, val_samples = splits["train"], splits["val"]
    # A run killed before its first checkpoint starts again from the beginning, which is the same run.
    resume = started and (folder / "last" / "state.json").is_file()

    detector = new_detector(config.model).to(device)
    train_set = frame_dataset(train_samples, detector.backbone, config.data, augment=True, seed=runtime.seed)
    val_set = frame_dataset(val_samples, detector.backbone, config.data)
    base = base_sha256(detector)
    first = ranks.is_first  # the other processes write nothing
    if first and not resume:  # a damaged file or a leak is found now, not hours into an epoch
        train_contents = _read_and_compare(splits, runtime.progress)
    method = build_method(
        config.method.name,
        detector,
        config.method,
        runtime.seed,
        calibration=calibration_on(train_set, config.optim, runtime.seed, device, runtime.workers),
        progress=runtime.progress,
    )
    if first and not resume:
        # Written only now, so that a mistake in the settings does not leave a folder that looks like a run.
        write_groups(folder, train_samples, val_samples, train_contents)
        del train_contents  # this frame lasts as long as the run
        if recipe is not None:
            write_recipe(folder, recipe)
        save_config(config, folder / "config.yaml")
        write_json(folder / "environment.json", provenance(str(device)))
    ranks.wait()  # the first process has read every file
    trackers = Trackers(runtime.trackers, runtime.track_every, folder, to_dict(config)) if first else Trackers()
    result = fit(
        detector,
        method,
        train_set,
        val_set,
        optim=config.optim,
        runtime=runtime,
        folder=folder,
        resume=resume,
        ranks=ranks,
        trackers=trackers,
    )
    metrics = _metrics(config, method, train_set, val_set, result, device) | {"processes": ranks.size}
    if not first:
        return RunResult(folder, detector, method, result, metrics)

    save_method(detector, method, config.method, folder / "adapter", base=base)
    write_json(folder / "metrics.json", metrics)
    plot_history(result.history, folder / "plots" / "history.png")
    if "drift" in result.history[-1]:
        plot_drift(result.history, folder / "plots" / "drift.png")
    if result.mask_history:
        plot_masks(result.mask_history, list(method.masks.layer_names), folder / "plots" / "masks.png")
    return RunResult(folder, detector, method, result, metrics)


def _read_and_compare(splits: dict[str, Samples], progress: bool) -> list[Content]:
    """The contents of the training files, after those of all splits were read and compared."""
    samples = Samples(chain.from_iterable(splits[split] for split in ("train", "val", "test")))
    contents = read_contents(samples, progress)
    check_contents(samples, contents)
    return contents[: len(splits["train"])]


def _metrics(
    config: TrainConfig,
    method: Method,
    train_set: FrameDataset,
    val_set: FrameDataset,
    result: FitResult,
    device: torch.device,
) -> dict[str, Any]:
    """The content of metrics.json."""
    runtime = config.runtime
    scores = torch.sigmoid(result.val_logits.double()).numpy()
    return {
        "provenance": provenance(str(device)),
        "method": config.method.name,
        "precision": resolve_precision(runtime.precision, device),
        "trainable_parameters": method.trainable_parameters,
        "samples": {"train": len(train_set), "val": len(val_set)},
        "selection": "best epoch by AUC on source validation" if config.optim.select == "best" else "last epoch",
        "chosen_epoch": result.best_epoch,
        "steps": result.steps,
        "images_per_second": result.images_per_second,
        "seconds": result.seconds,
        "waited": result.waited,
        "peak_memory_bytes": result.peak_memory_bytes,
        "gpu_busy": result.gpu_busy,
        "skipped_steps": result.skipped_steps,
        "quantization": _quantization(method),
        "source_validation": evaluate_scores(val_set.samples, scores),
        "mask_history": result.mask_history,
    }


def _quantization(method: Method) -> dict[str, Any] | None:
    """Format, memory and largest rounding of the weights in 8 bits; None without any."""
    report = method.quantization
    if report is None:
        return None
    return {
        "format": report.format,
        "weights": len(report.weights),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "largest_rounding": max(weight.error for weight in report.weights),
    }


def _check_folder(folder: Path, config: TrainConfig) -> bool:
    """Whether this run was started in `folder` before. Raises ConfigError if the folder holds another run."""
    check_output_folder(folder)
    started = (folder / "config.yaml").is_file()
    if started and not config.resume:
        raise ConfigError(f"{folder} already holds a run: continue it with --resume, or give another --out")
    if config.resume and not started:
        raise ConfigError(f"nothing to resume: {folder} holds no run")
    if started:
        changed = _differences(to_dict(load_config(folder / "config.yaml")), to_dict(config))
        if changed:
            raise ConfigError(
                f"{folder} was started with other settings and cannot be resumed with these: {'; '.join(changed)}; "
                "leave these settings out, or give another --out for a new run"
            )
    return started


def _differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Settings that differ between two runs, one line each.

    Settings that do not affect the weights are ignored, and so are `threads` and `device`: the checkpoint compares what
    was in use.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        return [line for key in new for line in _differences(old.get(key), new[key], f"{name}.{key}" if name else key)]
    ignored = (
        "out",
        "resume",
        *(
            f"runtime.{name}"
            for name in ("device", "progress", "checkpoint_every", "threads", "workers", "trackers", "track_every")
        ),
    )
    same = (list(old) if isinstance(old, tuple) else old) == (list(new) if isinstance(new, tuple) else new)
    return [] if same or name in ignored else [f"{name} was {old!r}, is {new!r}"]
