"""A finished run as a model that others load: written, loaded again, compared with the run, and described."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from masm_detect.config import HfConfig, RuntimeConfig
from masm_detect.errors import require_setting
from masm_detect.evaluation.run_data import run_samples
from masm_detect.evaluation.runs import load_run
from masm_detect.methods.adapters import base_sha256
from masm_detect.models.detector import new_detector
from masm_detect.results import check_output_folder, read_json, write_json
from masm_detect.runtime import process_settings

from .certificate import FEWEST, FILE, LIMIT, certify, choose_crops, logits_on
from .format import ExportError, Run
from .model_card import write_model_card
from .registry import FORMATS, load

FormatName = Literal[tuple(FORMATS)]
_COLUMNS = HfConfig()


def export_run(
    run: str,
    *,
    format: FormatName,
    out: str,
    data: list[str] | None = None,
    split: str | None = None,
    images: int = FEWEST,
    allow_fewer: bool = False,
    limit: float = LIMIT,
    license: str | None = None,
    root: str | None = None,
    prefix_map: dict[str, str] | None = None,
    compression: str | None = None,
    label_map: dict[str, int] | None = None,
    video_pattern: str | None = None,
    missing: Literal["error", "skip"] = "error",
    hf: HfConfig = _COLUMNS,
    threads: int | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Export a run, with a certificate and a model card. `out` appears at the end, complete, or not at all.

    Args:
        run: the run folder written by `masm train`
        format: onnx: standard ONNX operators, for onnxruntime; hf: a folder for transformers.pipeline (with
            masm_detect.hub where transformers has no model of its own for the backbone); adapter: the trained weights
            only, for masm_ext
        out: the folder to write; it must not exist, or be empty
        data: the images of the certificate: data sets as in masm eval; null: the validation data of the run
        split: of data, read this split only; null: all
        images: number of crops of the certificate, at least 256, evenly spread over the data
        allow_fewer: accept fewer crops; the certificate states the number
        limit: largest accepted difference between a logit of the run and of the export. Rounding in float32 gives 1e-6
            to 1e-4, a wrong layer or resizing 1e-2 and more
        license: identifier of the license, for the model card, e.g. apache-2.0; null: unknown
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
        threads: threads of torch; null: torch's own setting
        progress: show progress bars

    Returns:
        The certificate (`certificate.certify`), which is also in `out`.

    Raises:
        ConfigError: the folder holds no finished run, or a setting cannot work.
        ExportError: `out` is not empty, the format cannot hold this run, there are too few crops, or a logit differs by
            more than `limit`.
        DatasetError, UnreadableImage: the images cannot be read.
    """
    require_setting(format in FORMATS, "format", format, f"one of {', '.join(FORMATS)}")
    require_setting(limit > 0, "limit", limit, "above 0")
    require_setting(images >= 1, "images", images, "at least 1")
    require_setting(images >= FEWEST or allow_fewer, "images", images, f"at least {FEWEST}, or give --allow-fewer")
    target = Path(out)
    _check_target(target)
    exporter = load(format)
    with process_settings(RuntimeConfig(device="cpu", threads=threads)):
        config, detector = load_run(run)
        source = Run(Path(run), config, detector.eval())
        exporter.check(source)
        reading = {"root": root, "prefix_map": prefix_map, "compression": compression, "label_map": label_map}
        reading |= {"video_pattern": video_pattern, "missing": missing, "hf": hf}
        samples, what = run_samples(config.data, data, split, need_both_classes=False, **reading)
        crops = choose_crops(
            samples, detector.backbone, config.data, count=images, allow_fewer=allow_fewer, source=what
        )
        reference = logits_on(detector, crops, "run" if progress else None)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", suffix=".tmp", dir=target.parent) as parent:
            folder = Path(parent) / target.name
            folder.mkdir()
            source = replace(source, base_hash=base_sha256(new_detector(config.model)))
            exporter.write(source, folder)
            loaded = exporter.load(source, folder)
            certificate = certify(exporter, loaded, folder, reference, crops, limit, progress)
            needed = exporter.needed_import(source)
            certificate["needed_import"] = needed and {"module": needed[0], "reason": needed[1]}
            write_json(folder / FILE, certificate)
            write_model_card(
                source,
                folder,
                read_json(folder / FILE),
                library="masm_ext" if needed else exporter.library,
                usage="hub" if needed else exporter.usage,
                name=target.name,
                license=license,
            )
            for path in folder.rglob("*"):  # some writers make files that only their owner reads
                path.chmod(0o755 if path.is_dir() else 0o644)
            folder.chmod(0o755)
            if target.is_dir():
                target.rmdir()  # empty, as checked
            shutil.move(folder, target)
    return certificate


def _check_target(target: Path) -> None:
    """Raise ExportError if `target` is a folder with files in it."""
    check_output_folder(target)
    if target.is_dir() and any(target.iterdir()):
        raise ExportError(f"{target} is not empty: give another --out")
