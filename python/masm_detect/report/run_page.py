"""The report of a run as one HTML page (`masm report`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .page import figure_svg, render
from .plots import history_figure, masks_figure
from .run_figures import ablation_figure, angles_figure, drift_dots, selection_figure, spectra_figure
from .tables import format_cell, interval_of

#: Settings in the summary at the top of the page; all of them are below.
_SUMMARY = (
    ("backbone", ("model", "backbone")),
    ("input size", ("model", "image_size")),
    ("data", ("data", "paths")),
    ("method", ("method", "name")),
    ("adapted layers", ("method", "targets")),
    ("epochs", ("optim", "epochs")),
    ("batch size", ("optim", "batch_size")),
    ("seed", ("runtime", "seed")),
)


def run_page(report: Mapping[str, Any]) -> str:
    """The page for the content of `run_report.collect.run_report`."""
    masks, subspaces, ablation = report["masks"], report["subspaces"], report["ablation"]
    drift = {row["name"]: row["drift"] for row in report["drift"]}
    values = {
        "report": report,
        "summary": _summary(report),
        "settings": list(_flat(report["config"])),
        "metrics": _metrics(report["metrics"]["source_validation"]),
        "history": figure_svg(history_figure(report["history"])),
        "history_rows": report["history"],
        "drift": figure_svg(drift_dots(report["drift"])) if drift else None,
        "largest_drift": max(drift.items(), key=lambda item: item[1]) if drift else None,
        "masks": None,
        "random_masks": None,
        "selection": None,
        "angles": None,
        "spectra": None,
        "ablation": None,
        "ablation_rows": [],
    }
    if masks is not None:
        values["masks"] = figure_svg(masks_figure(_entries(masks["steps"], masks["mask"]), masks["layers"]))
        drawn = _entries(masks["steps"], masks["random"]["mask"])
        values["random_masks"] = figure_svg(masks_figure(drawn, masks["layers"]))
        values["selection"] = figure_svg(selection_figure(masks))
    if subspaces is not None:
        values["angles"] = figure_svg(angles_figure(subspaces["layers"]))
        values["spectra"] = figure_svg(spectra_figure(subspaces["spectra"], drift))
    if ablation is not None:
        values["ablation"] = figure_svg(ablation_figure(ablation))
        values["ablation_rows"] = list(_ablation_rows(ablation))
    return render("run.html", **values)


def _summary(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = []
    for title, (section, key) in _SUMMARY:
        value = report["config"][section][key]
        value = "the model's own" if value is None else value
        rows.append((title, ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)))
    metrics = report["metrics"]
    masm = report["config"]["method"]["masm"]
    if report["subspaces"] is not None:
        ranks = sorted({tuple(row["ranks"]) for row in report["subspaces"]["layers"]})
        shown = "; ".join(", ".join(map(str, ranks_of_layer)) for ranks_of_layer in ranks[:4])
        rows += [
            ("subspaces", f"{masm['num_subspaces']} of the ranks {shown}, {masm['directions']} directions"),
            ("masks", masm["mask_policy"] if metrics["method"] == "masm" else "none (masm-nomask)"),
        ]
    rows += [
        ("trained weights", f"{metrics['trainable_parameters']:,}"),
        ("images", f"{metrics['samples']['train']:,} for training, {metrics['samples']['val']:,} for validation"),
        ("steps", f"{metrics['steps']:,} ({metrics['skipped_steps']:,} skipped by the optimizer)"),
        ("kept weights", f"epoch {metrics['chosen_epoch']} ({metrics['selection']})"),
        ("precision", metrics["precision"]),
    ]
    return rows


def _metrics(validation: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for dataset, entry in validation["datasets"].items():
        parts = dict(entry["methods"])
        if len(parts) != 1:
            parts["all"] = entry["all"]
        for method, numbers in parts.items():
            counts = [f"{numbers[name]:,}" for name in ("n_real", "n_fake", "n_groups")]
            cells = [format_cell(interval_of(numbers, name)) for name in ("auc", "video_auc")]
            rows.append([dataset, method, *counts, *cells])
    return rows


def _entries(steps: Sequence[int], masks: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"step": step, "mask": mask} for step, mask in zip(steps, masks)]


def _ablation_rows(ablation: Mapping[str, Any]) -> Any:
    """(variant, data set, forgery, AUC, difference) as texts."""
    for variant in ablation["variants"]:
        for row in variant["results"]:
            difference = "-" if row["difference"] is None else f"{row['difference']:+.3f}"
            if row["difference_ci"] is not None:
                difference += " [{:+.3f}, {:+.3f}]".format(*row["difference_ci"])
            auc = format_cell((row["auc"], *(row["auc_ci"] or (None, None))))
            yield variant["name"], row["dataset"], row["method"], auc, difference


def _flat(value: Any, name: str = "") -> Any:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{name}.{key}" if name else str(key))
    else:
        yield name, "null" if value is None else str(value)
