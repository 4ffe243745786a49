"""Results as rich tables for the terminal, and as cells for the plots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from ..config import MasmOptions
from ..evaluation.intervals import MIN_CLUSTERS
from ..evaluation.metrics import METRICS

Cell = tuple[float | None, float | None, float | None]


def auc_cells(result: Mapping[str, Any]) -> dict[str, Cell]:
    """(AUC, low, high) of each data set and forgery method in a result of `evaluation.metrics.evaluate_scores`."""
    cells: dict[str, Cell] = {}
    for dataset, entry in result["datasets"].items():
        prefix = f"{dataset}: " if len(result["datasets"]) > 1 else ""
        for method, numbers in entry["methods"].items():
            cells[f"{prefix}{method}"] = interval_of(numbers, "auc")
        if len(entry["methods"]) > 1:
            cells[f"{prefix}all"] = interval_of(entry["all"], "auc")
    return cells


def auc_counts(result: Mapping[str, Any]) -> dict[str, int]:
    """Samples, real and fake together, behind each of the `auc_cells`."""
    counts: dict[str, int] = {}
    for dataset, entry in result["datasets"].items():
        prefix = f"{dataset}: " if len(result["datasets"]) > 1 else ""
        for method, numbers in (*entry["methods"].items(), ("all", entry["all"])):
            counts[f"{prefix}{method}"] = numbers["n_real"] + numbers["n_fake"]
    return counts


def interval_of(numbers: Mapping[str, Any], name: str) -> Cell:
    """(value, low, high) of a metric; low and high are None without an interval (too few groups)."""
    low, high = numbers.get(f"{name}_ci") or (None, None)
    return numbers.get(name), low, high


def format_cell(cell: Cell) -> str:
    """`.812 [.750, .870]`, or a dash for a value that is not defined for these samples."""
    value, low, high = cell
    if value is None:
        return "-"
    text = _short(value)
    return text if low is None or high is None else f"{text} [{_short(low)}, {_short(high)}]"


def results_table(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """One row for each run, data set and forgery method: counts, AUC with interval, and the metrics with a title.

    The accuracy at a calibrated threshold and the video AUC of DeepfakeBench's code have a column if a row needs it.
    """
    table = Table(title=f"P(fake) against the label; {_about_intervals(runs)}", title_justify="left")
    for name in ("run", "data set", "forgery"):
        table.add_column(name, overflow="fold")
    metrics = {key: metric.title for key, metric in METRICS.items() if metric.title is not None and metric.brief}
    by_key = shows_video_keys(runs)
    calibrated = shows_calibrated(runs)
    last = [*(["cal. acc"] if calibrated else []), *(["dfb-compat"] if by_key else [])]
    for name in ("real", "fake", "AUC", *metrics.values(), "video AUC", *last):
        table.add_column(name, justify="right")
    warnings, openings = [], []
    for run, result in runs.items():
        warnings += leak_warnings(run, result)
        openings += opening_lines(run, result)
        for dataset, entry in result["datasets"].items():
            for method, numbers in method_rows(entry).items():
                table.add_row(
                    run,
                    dataset,
                    method,
                    str(numbers["n_real"]),
                    str(numbers["n_fake"]),
                    format_cell(interval_of(numbers, "auc")),
                    *(format_cell((numbers.get(key), None, None)) for key in metrics),
                    format_cell(interval_of(numbers, "video_auc")),
                    *([calibrated_cell(numbers)] if calibrated else []),
                    *([video_key_cell(numbers)] if by_key else []),
                )
        table.add_section()
    if warnings or openings:
        table.caption, table.caption_justify = "\n".join((*warnings, *openings)), "left"
        table.caption_style = "bold red" if warnings else "yellow"
    return table


def method_rows(entry: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The rows of a data set: its methods, and "all" unless there is one method only."""
    # A data set without fakes has no method of its own to list.
    return {**entry["methods"], **({"all": entry["all"]} if len(entry["methods"]) != 1 else {})}


def shows_video_keys(runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether the video AUC of some row differs under DeepfakeBench's merging of equally named videos."""
    return any(video_key_cell(numbers) for numbers in _all_numbers(runs))


def shows_calibrated(runs: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether a run has a calibrated threshold."""
    return any(numbers.get("video_accuracy_calibrated") is not None for numbers in _all_numbers(runs))


def calibrated_cell(numbers: Mapping[str, Any]) -> str:
    """The accuracy of videos at the calibrated threshold."""
    return format_cell((numbers.get("video_accuracy_calibrated"), None, None))


def video_key_cell(numbers: Mapping[str, Any]) -> str:
    """The video AUC under dfb-compat where it differs from the correct one, else ""."""
    by_key = numbers.get("video_auc_by_key")
    # Where each image is a video, DeepfakeBench's code takes a folder of images for one video, which means nothing.
    if not by_key or numbers["n_real"] + numbers["n_fake"] == numbers["n_real_videos"] + numbers["n_fake_videos"]:
        return ""
    correct, other = by_key["correct"], by_key["dfb-compat"]
    return "" if correct == other else format_cell((other, None, None))


def _all_numbers(runs: Mapping[str, Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [
        numbers
        for result in runs.values()
        for entry in result["datasets"].values()
        for numbers in (entry["all"], *entry["methods"].values())
    ]


def speed_line(metrics: Mapping[str, Any]) -> str:
    """Throughput, waiting time and GPU numbers of a run in one line, from its metrics.json."""
    parts = [f"{metrics['images_per_second']:.1f} images/s"]
    if metrics["seconds"]:
        parts.append(f"{metrics['waited'] / metrics['seconds']:.0%} of the time spent waiting for data")
    if metrics["peak_memory_bytes"] is not None:
        parts.append(f"peak memory {metrics['peak_memory_bytes'] / 2**30:.1f} GiB")
    if metrics["gpu_busy"] is not None:
        parts.append(f"GPU busy {metrics['gpu_busy']:.0%} of the time")
    return "training: " + ", ".join(parts)


def mapping_table(title: str, content: Mapping[str, Any]) -> Table:
    """Two columns, name and value; nested mappings become dotted names."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flat(content):
        table.add_row(name, value)
    return table


def masks_line(metrics: Mapping[str, Any], options: MasmOptions) -> str:
    """A warning that a run of masm ended before its first selection of masks; "" for every other run."""
    if metrics["method"] != "masm" or options.mask_policy != "bias_variance" or metrics["mask_history"]:
        return ""
    return (
        f"masks: none was selected in {metrics['steps']} steps, so this is masm-nomask: the first selection is due "
        f"after method.masm.mask_warmup = {options.mask_warmup}"
    )


class _Console(Console):
    def on_broken_pipe(self) -> None:
        raise  # rich calls this while it handles a BrokenPipeError, and would exit; commands/main.py handles it


def show(table: Table) -> None:
    """Print a table to standard output, wide enough for its columns when the output is not a terminal."""
    # names of data sets and files may hold what rich takes for markup
    options = {"markup": False, "emoji": False}
    console = _Console(**options)
    if not console.is_terminal:
        console = _Console(width=160, **options)
    console.print(table)


def leak_warnings(run: str, result: Mapping[str, Any]) -> list[str]:
    """The counts of `data.seen.seen_in_training` in a result as warnings."""
    seen, found = result.get("seen_in_training") or {}, []
    if seen.get("files"):
        found.append(f"{run} was trained on {seen['files']} of these {seen['of_samples']} images")
    if seen.get("near_copies"):
        found.append(
            f"{seen['near_copies']} of these {seen['of_samples']} images look like images that {run} was trained on "
            "(copies of another size or compression, or a forgery and its original)"
        )
    if seen.get("groups"):
        found.append(
            f"{seen['groups']} of these {seen['of_groups']} groups ({seen['samples']} of {seen['of_samples']} images) "
            f"have the names of groups that {run} was trained on"
        )
    if not found:
        return []
    by_name_only = seen.get("files") == 0 and not seen.get("near_copies")
    doubt = ", though no file is the same: if they are the same videos," if by_name_only else ":"
    return [f"WARNING: {', and '.join(found)}{doubt} its numbers are not those of unseen data"]


def opening_lines(run: str, result: Mapping[str, Any]) -> list[str]:
    """Which test sets of a run's results were opened before (`evaluation.test_sets`): one line, or none."""
    found = []
    for entry in result.get("test_sets") or ():
        own, siblings = entry["opened_before"], entry["opened_by_siblings"]
        counts = [
            *([f"opened {_times(own)} before"] if own else []),
            *([f"{_times(siblings)} by other runs beside it, trained on the same data"] if siblings else []),
        ]
        if counts:
            splits = "" if entry["split"] == "test" else " (data without splits)"
            found.append(f"{entry['dataset']}{splits} {' and '.join(counts)}")
    if not found:
        return []
    return [f"test sets of {run}: {'; '.join(found)}. Settings that were changed since then may be chosen on them"]


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def _about_intervals(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """How the intervals of these results were computed, or why there are none."""
    if any(numbers.get(name) for numbers in _all_numbers(runs) for name in ("auc_ci", "video_auc_ci")):
        return "95% intervals by jackknife over groups"
    needs = f"{MIN_CLUSTERS} groups of each class, none with over a fifth of it, and an AUC below 1"
    return f"no intervals (they need {needs})"


def _flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for name, value in content.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            rows.append((f"{prefix}{name}", ", ".join(map(str, value)) or "-"))
        else:
            rows.append((f"{prefix}{name}", "-" if value is None else str(value)))
    return rows


def _short(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")
