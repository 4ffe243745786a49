"""All numbers of the report of a run (`masm report`); `report.run_page` makes the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

from masm_detect.config import HfConfig, RuntimeConfig
from masm_detect.config_files import to_dict
from masm_detect.data.frames import frame_dataset
from masm_detect.errors import require_setting
from masm_detect.evaluation.run_data import run_samples
from masm_detect.evaluation.runs import load_run
from masm_detect.provenance import provenance
from masm_detect.report.tables import masks_line
from masm_detect.results import ResultError, read_json
from masm_detect.runtime import process_settings, resolve_precision
from masm_ext import MASMLinear
from masm_ext.wrappers import modules_of

from .ablation import ablation_report
from .masks import mask_report
from .subspaces import subspace_report, weight_drift

_COLUMNS, _RUNTIME = HfConfig(), RuntimeConfig()


def run_report(
    run: str,
    *,
    data: list[str] | None = None,
    split: str | None = None,
    ablation: bool = True,
    images: int = 2000,
    seed: int = 0,
    root: str | None = None,
    prefix_map: dict[str, str] | None = None,
    compression: str | None = None,
    label_map: dict[str, int] | None = None,
    video_pattern: str | None = None,
    missing: Literal["error", "skip"] = "error",
    hf: HfConfig = _COLUMNS,
    runtime: RuntimeConfig = _RUNTIME,
) -> dict[str, Any]:
    """What a run learned, and where: the content of report.json.

    Args:
        run: the run folder written by `masm train`
        data: the images on which subspaces are switched off: data sets as in masm eval; null: the validation data of
            the run
        split: of data, read this split only; null: all
        ablation: score images with subspaces switched off; false: read no image
        images: largest number of these images, evenly spread over the data
        seed: of the random masks that the masks of the run are compared with
        root: for JSON files in data: the folder that relative frame paths start from; null: the folder of the file
        prefix_map: for JSON files: {prefix of a path in the file: prefix here}, applied before root; the longest match
            wins
        compression: for JSON files: c23, c40, ... if the file has several; null: the only one
        label_map: for JSON files and hf: paths: {label there: 0 (real) or 1 (fake)}, used before the known label names;
            null: known names only
        video_pattern: for folders: regular expression whose group 1 is the name of the video in the name of a loose
            image; null: each loose image is a video
        missing: for JSON files: what to do if a frame does not exist: error, or skip it
        hf: for hf: paths: which columns to read
        runtime: device, precision and processes of the scoring

    Returns:
        Plain values for JSON: {"provenance", "run": its name, "config", "metrics": metrics.json without the masks,
        "history": entries of history.jsonl, "masks": `masks.mask_report`, "masks_note": why there are none,
        "subspaces": `subspaces.subspace_report`, "drift": `subspaces.weight_drift`, "ablation":
        `ablation.ablation_report` with "source"}. Parts that the run cannot have are None.

    Raises:
        ConfigError: the folder holds no finished run, or a setting cannot work.
        ResultError: a file of the run is absent or broken.
        DatasetError, UnreadableImage: the images cannot be read.
    """
    require_setting(images >= 2, "images", images, "at least 2")
    folder = Path(run)
    with process_settings(runtime) as device:
        config, detector = load_run(folder, device)
        metrics = read_json(folder / "metrics.json")
        layers = list(modules_of(detector, MASMLinear))
        masks = mask_report(metrics.pop("mask_history", []), layers, seed)
        subspaces = switched = None
        if layers:
            subspaces = subspace_report(detector.eval(), runtime.progress)
        if layers and ablation:
            reading = {"root": root, "prefix_map": prefix_map, "compression": compression, "label_map": label_map}
            reading |= {"video_pattern": video_pattern, "missing": missing, "hf": hf}
            samples, source = run_samples(config.data, data, split, **reading)
            places = np.linspace(0, len(samples) - 1, min(images, len(samples))).round().astype(int)
            dataset = frame_dataset([samples[place] for place in places.tolist()], detector.backbone, config.data)
            options = {
                "batch_size": runtime.eval_batch_size,
                "precision": resolve_precision(runtime.precision, device),
                "workers": runtime.workers,
            }
            switched = ablation_report(detector, dataset, progress=runtime.progress, **options)
            switched |= {"source": source, "available": len(samples)}
        if subspaces is None:
            drift = weight_drift(detector, config.model)
        else:
            drift = [{"name": row["name"], "drift": row["drift"]} for row in subspaces["layers"]]
        note = "" if masks else masks_line(metrics | {"mask_history": []}, config.method.masm)
        return {
            "provenance": provenance(str(device)),
            "run": folder.resolve().name,
            "config": to_dict(config),
            "metrics": metrics,
            "history": read_history(folder),
            "masks": masks,
            "masks_note": note,
            "subspaces": subspaces,
            "drift": drift,
            "ablation": switched,
        }


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The entries of `history.jsonl`; raises ResultError if it is absent or broken."""
    path = folder / "history.jsonl"
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ResultError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ResultError(f"{path} is not valid JSON Lines (truncated or edited?): {error}") from error
