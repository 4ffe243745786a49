"""Examines data sets before training: what is there, leaks, damaged files, and what tells the label without a face.

The content of the files is read as `masm train` reads it, and from the same cache. Nothing is changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from masm_detect.config import HfConfig
from masm_detect.data.contents import survey
from masm_detect.data.decode import UnreadableImage
from masm_detect.errors import require_setting
from masm_detect.provenance import provenance

from .inventory import gaps, inventory
from .leaks import copied_files, divided_groups, similar_pictures
from .problems import Problem, plural
from .reading import read_all
from .shortcuts import shortcuts, untested
from .spectrum import spectrum_report

#: The default of `examine`, whose arguments are the options of the command.
_COLUMNS = HfConfig()


def examine(
    paths: Sequence[str],
    *,
    splits: list[str] | str | None = None,
    root: str | None = None,
    prefix_map: dict[str, str] | None = None,
    compression: str | None = None,
    label_map: dict[str, int] | None = None,
    video_pattern: str | None = None,
    hf: HfConfig = _COLUMNS,
    limit: int = 500,
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Any]:
    """The report about one or several data sets. A problem does not end the examination.

    Args:
        paths: DeepfakeBench JSON files, folders with real/ and fake-<method>/, or Hugging Face data sets (hf:...)
        splits: read these splits only (one, or a list): train, val, test, or all for samples that are not divided;
            null: every sample
        root: for JSON files: the folder that relative frame paths start from; null: the folder of the file
        prefix_map: for JSON files: {prefix of a path in the file: prefix here}, applied before root; the longest match
            wins
        compression: for JSON files: c23, c40, ... if the file has several; null: the only one
        label_map: for JSON files and hf: paths: {label there: 0 (real) or 1 (fake)}, used before the known label names;
            null: known names only
        video_pattern: for folders: regular expression whose group 1 is the name of the video in the name of a loose
            image, e.g. "(.+)_[0-9]+" for video_frame.jpg; null: each loose image is a video
        hf: for hf: paths: which columns to read
        limit: images of each data set and method whose spectrum is computed, drawn at random
        seed: seed of this choice and of the cross-validation
        progress: show progress bars

    Returns:
        Plain values for JSON: {"provenance", "paths", "errors" and "warnings": numbers of problems, "problems":
        [{"level", "kind", "message", "count", "lines"}] (`problems.Problem`), "notes": [texts], "inventory":
        `inventory.inventory`, "shortcuts": rows of `shortcuts.shortcuts`, "spectrum": `spectrum.spectrum_report`}.

    Raises:
        ConfigError: no path, a path given twice, or a limit below 1.
        DatasetError: a path does not exist, or no data set can be read.
    """
    require_setting(limit >= 1, "limit", limit, "at least 1")
    paths = [str(path) for path in paths]
    splits = [splits] if isinstance(splits, str) else splits
    reading = read_all(
        paths,
        splits=splits,
        video_pattern=video_pattern,
        root=root,
        prefix_map=prefix_map,
        compression=compression,
        label_map=label_map,
        hf=hf,
    )
    problems = [*reading.problems, *divided_groups(reading.samples)]
    found = survey([sample.path for sample in reading.samples], progress)
    damaged = [str(content) for content in found if isinstance(content, UnreadableImage)]
    if damaged:
        text = f"{plural(len(damaged), 'file')} absent or damaged: replace or remove them"
        problems.append(Problem("error", "damaged", text, len(damaged), damaged))
    samples = [s for s, content in zip(reading.samples, found) if not isinstance(content, UnreadableImage)]
    contents = [content for content in found if not isinstance(content, UnreadableImage)]
    copied, same_bytes = copied_files(samples, contents)
    alike, same_picture = similar_pictures(samples, contents)
    properties, by_property = shortcuts(samples, contents, seed)
    spectrum, by_spectrum = spectrum_report(
        samples, [*same_bytes, *same_picture], limit=limit, seed=seed, progress=progress
    )
    problems += [*copied, *alike, *by_property, *by_spectrum]
    problems.sort(key=lambda problem: problem.level)  # errors first
    rows = inventory(samples, contents)
    return {
        "provenance": provenance(),
        "paths": paths,
        "errors": sum(problem.level == "error" for problem in problems),
        "warnings": sum(problem.level == "warning" for problem in problems),
        "problems": [asdict(problem) for problem in problems],
        "notes": [*reading.notes, *gaps(rows), *untested(properties)],
        "inventory": rows,
        "shortcuts": properties,
        "spectrum": spectrum,
    }
