"""The model card of an export, README.md in the form of Hugging Face, filled in from the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from masm_detect.evaluation.metrics import METRICS
from masm_detect.models.pretrained import without_folder
from masm_detect.report.tables import format_cell, interval_of
from masm_detect.results import read_json, write_text

from .format import Run
from .preprocessing import CALIBRATION, CROPS
from .usage import USAGE

UNKNOWN_LICENSE = "unknown: ask the base model's"


def write_model_card(
    run: Run,
    folder: Path,
    certificate: Mapping[str, Any] | None,
    *,
    library: str,
    usage: str,
    name: str,
    license: str | None,
) -> None:
    """Write README.md to an export.

    Args:
        run: the run, with `base_hash`.
        folder: of the export, which has the name `name` at the end.
        certificate: as `certificate.certify` returns it; None: the model was not compared with the run.
        library: name of the library that loads the model.
        usage: key of `usage.USAGE`: how it is used.
        name: of the exported model.
        license: identifier of a license; None: `UNKNOWN_LICENSE`.
    """
    from huggingface_hub import ModelCard, ModelCardData

    metrics = read_json(run.folder / "metrics.json")
    validation = metrics["source_validation"]
    backbone, local = without_folder(run.config.model.backbone)
    on_hub = not local and not backbone.startswith("bundled:")
    data = ModelCardData(
        license=license or UNKNOWN_LICENSE,
        library_name=library,
        pipeline_tag="image-classification",
        base_model=backbone.removeprefix("open_clip:") if on_hub else None,
        tags=["deepfake-detection", "image-forensics", "masm"],
    )
    values = {
        "name": name,
        "method": metrics["method"],
        "calibration": _calibration(run, usage),
        "usage": USAGE[usage].format(name=name, size=run.detector.backbone.image_size),
        "crops": _crops(run, usage),
        "data_sentence": _data_sentence(run, metrics),
        "data_table": _data_table(validation),
        "selection": metrics["selection"],
        "interval_note": _interval_note(validation),
        "metric_table": _metric_table(validation),
        "fact_table": _table(("", ""), _facts(run, metrics)),
        **({"crops_count": None} if certificate is None else _certificate_values(certificate)),
    }
    template = files("masm_detect.export").joinpath("templates/model_card.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **values)
    write_text(folder / "README.md", str(card).rstrip() + "\n")


def _data_sentence(run: Run, metrics: Mapping[str, Any]) -> str:
    count = metrics["samples"]
    text = f"Trained on {count['train']:,} images, validated on {count['val']:,}"
    if (path := run.folder / "groups.json").is_file():
        groups = read_json(path)
        text += f", from {len(groups['train']):,} and {len(groups['val']):,} groups"
    names = ", ".join(f"`{path}`" for path in run.config_without_paths().data.paths)
    text += f". Data sets as given: {names}."
    if run.config.data.self_blended:
        text += " The fakes are self-blended versions of the real images."
    return text


def _rows(validation: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(data set, forgery, numbers), with a row "all" where there are several forgeries."""
    rows = []
    for dataset, entry in validation["datasets"].items():
        rows += [(dataset, method, numbers) for method, numbers in entry["methods"].items()]
        if len(entry["methods"]) != 1:
            rows.append((dataset, "all", entry["all"]))
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _data_table(validation: Mapping[str, Any]) -> str:
    counts = {
        "n_real": "real images",
        "n_fake": "fake images",
        "n_real_groups": "real groups",
        "n_fake_groups": "fake groups",
    }
    rows = [[dataset, method, *(n[key] for key in counts)] for dataset, method, n in _rows(validation)]
    return _table(("data set", "forgery", *counts.values()), rows)


def _metric_table(validation: Mapping[str, Any]) -> str:
    titles = {name: metric.title for name, metric in METRICS.items() if metric.title}
    rows = [
        [
            dataset,
            method,
            format_cell(interval_of(n, "auc")),
            format_cell(interval_of(n, "video_auc")),
            *(format_cell((n.get(name), None, None)) for name in titles),
        ]
        for dataset, method, n in _rows(validation)
    ]
    return _table(("data set", "forgery", "AUC", "video AUC", *titles.values()), rows)


def _calibration(run: Run, usage: str) -> str:
    if not (run.folder / CALIBRATION).is_file():
        return "It is not calibrated."
    if usage == "adapter":
        return f"`{CALIBRATION}` holds the calibration of the run."
    return "It is not calibrated: the calibration of the run is in the format `adapter` only."


def _crops(run: Run, usage: str) -> str:
    if not (run.folder / CROPS).is_file():
        return "The images must be crops like those of the training data; the run does not record how these were cut."
    place = f"`{CROPS}`" if usage == "adapter" else "`crops` in `preprocessing.json`"
    return f"The images must be crops, cut as for training: {place} holds how."


def _interval_note(validation: Mapping[str, Any]) -> str:
    if any(numbers.get("auc_ci") for _, _, numbers in _rows(validation)):
        return "In brackets: 95% intervals over groups (jackknife)."
    return "No intervals: too few independent groups, or an AUC of exactly 0 or 1."


def _facts(run: Run, metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    config, backbone = run.config, run.detector.backbone
    name, local = without_folder(config.model.backbone)
    base = f"`{name}`{' (a local folder)' if local else ''}"
    packages = metrics["provenance"]["packages"]
    return [
        ("base model", base),
        ("SHA-256 of the base weights", f"`{run.base_hash}`"),
        ("input", f"{backbone.image_size} x {backbone.image_size} pixels, crop: {config.data.crop}"),
        ("feature", f"{backbone.pool}, {backbone.feature_dim} values, linear head"),
        ("method", f"{metrics['method']} on {config.method.targets}"),
        ("trained weights", f"{metrics['trainable_parameters']:,}"),
        ("training", f"{metrics['steps']:,} steps of {config.optim.batch_size} images, {metrics['precision']}"),
        ("trained with", ", ".join(f"{name} {packages[name]}" for name in ("masm-ext", "torch", "transformers"))),
    ]


def _certificate_values(certificate: Mapping[str, Any]) -> dict[str, Any]:
    parts = [f"{found['largest']:.2g} by {name}" for name, found in certificate["difference_from_image_files"].items()]
    packages = certificate["provenance"]["packages"] | certificate["provenance"]["format_packages"]
    shown = ("masm-ext", "torch", "transformers", "onnx", "onnxruntime", "onnxscript")
    return {
        "crops_count": certificate["crops"]["count"],
        "crops_source": certificate["crops"]["source"],
        "largest": f"{certificate['difference_on_the_same_pixels']['largest']:.2g}",
        "limit": f"{certificate['limit']:g}",
        "file_sentence": f", and from the image files, decoded and resized by the export, {', '.join(parts)}"
        if parts
        else "",
        "versions": ", ".join(f"{name} {packages[name]}" for name in shown if name in packages),
    }
