"""Score files of several detectors, matched sample by sample, and their runs grouped by seed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from masm_detect.data.sample import Sample
from masm_detect.results import read_json

from .score_file import ScoreFileError, ScoreRow, labelled, name_of, read_scores

#: `NAME-seed1`, as runs of one method with several seeds are named.
_SEED = re.compile(r"(.+?)[-_.]?seed[-_.=]?(\d+)")
#: Name of the data set of files without a column for it.
UNNAMED = "data"
#: Files that an error lists.
_EXAMPLES = 3
Key = tuple[str, str, int | None, int | None]


class CompareError(ScoreFileError):
    """Score files that cannot be compared; the message names them and what differs."""


@dataclass(frozen=True)
class Run:
    """One score file.

    Attributes:
        name: of the run
        path: the file
        rows: what it holds
    """

    name: str
    path: Path
    rows: Sequence[ScoreRow]


@dataclass(frozen=True)
class Detector:
    """The runs that are compared as one: one run, or the seeds of one method.

    Attributes:
        name: of the run, or what the seeds have in common
        runs: its runs, ordered by seed
        seeds: their seeds as their names have them; None: unknown
    """

    name: str
    runs: tuple[Run, ...]
    seeds: tuple[int | None, ...]


def load_detectors(evals: Sequence[str], groups: Sequence[str] = ()) -> list[Detector]:
    """The detectors of evaluation folders, folders of runs in them, and score files.

    Args:
        evals: folders or files; runs that are named alike but for a seed become one detector.
        groups: `NAME=EVAL,EVAL,...`: runs that are one detector whatever their names.

    Raises:
        CompareError: nothing to read in a folder, a file that is named twice, or fewer than two detectors.
    """
    asked: list[tuple[str, list[Run]]] = []
    for group in groups:
        name, equals, members = group.partition("=")
        if not name or not equals or not members:
            raise CompareError(f"--group is {group!r}; it must be NAME=EVAL,EVAL,...")
        asked.append((name, [run for member in members.split(",") for run in _runs(member)]))
    single = [run for one in evals for run in _runs(one)]
    grouped = [run for _, runs in asked for run in runs]
    for named in (single, grouped):
        paths = Counter(run.path.resolve() for run in named)
        if twice := [run.path for run in named if paths[run.path.resolve()] > 1]:
            raise CompareError(f"{twice[0]} is named twice: a detector cannot be compared with itself")
    taken = {run.path.resolve() for run in grouped}
    single = [run for run in single if run.path.resolve() not in taken]  # a --group takes runs out of a folder
    by_name: dict[str, list[Run]] = {}
    single = _distinct(single)
    alike = Counter(_without_seed(run.name) for run in single)
    for run in single:
        name = _without_seed(run.name)
        by_name.setdefault(name if alike[name] > 1 else run.name, []).append(run)
    for name, runs in asked:
        if name in by_name:
            raise CompareError(f"two detectors are called {name!r}: give the --group another name")
        by_name[name] = runs
    if len(by_name) < 2:
        found = "; ".join(f"{name} ({len(runs)} seeds)" for name, runs in by_name.items()) or "none"
        raise CompareError(f"a comparison needs two detectors, and this is one: {found}; name another EVAL")
    return [_detector(name, runs) for name, runs in by_name.items()]


def _detector(name: str, runs: Iterable[Run]) -> Detector:
    seeds = {run.path: int(found[2]) if (found := _SEED.fullmatch(run.name)) else None for run in runs}
    ordered = sorted(runs, key=lambda run: (seeds[run.path] is None, seeds[run.path] or 0))
    return Detector(name, tuple(ordered), tuple(seeds[run.path] for run in ordered))


def _without_seed(name: str) -> str:
    found = _SEED.fullmatch(name)
    return found[1] if found else name


def _distinct(runs: Sequence[Run]) -> list[Run]:
    """Runs of equal names get the name of the folder that they are in."""
    count = Counter(run.name for run in runs)
    found, taken = [], set()
    for run in runs:
        name = run.name
        if count[name] > 1:
            folder = run.path.resolve().parent
            name = f"{folder.parent.name if run.path.stem == 'scores' else folder.name}/{name}"
        candidate, number = name, 2
        while candidate in taken:
            candidate, number = f"{name}-{number}", number + 1
        taken.add(candidate)
        found.append(replace(run, name=candidate))
    return found


def _runs(place: str) -> list[Run]:
    path = Path(place)
    if not path.is_dir():
        return [Run(name_of(path), path, read_scores(path))]
    if (path / "scores.csv").is_file():
        return [Run(path.resolve().name, path / "scores.csv", read_scores(path / "scores.csv"))]
    if not (path / "results.json").is_file():
        raise CompareError(f"{path} holds no results: name a folder written by `masm eval`, or a score file")
    files = {name: path / name / "scores.csv" for name in read_json(path / "results.json").get("runs", {})}
    if absent := [name for name, file in files.items() if not file.is_file()]:
        raise CompareError(f"{path} has no scores of {absent[0]} ({files[absent[0]]} is absent): run `masm eval` again")
    return [Run(name, file, read_scores(file)) for name, file in files.items()]


@dataclass(frozen=True)
class Matched:
    """What all runs scored.

    Attributes:
        samples: the n samples, in the order of the first run
        scores: run path -> P(fake) [n]
        left_out: name of each run -> its samples that are not among them
    """

    samples: list[Sample]
    scores: dict[Path, np.ndarray]
    left_out: dict[str, int]


def match(detectors: Sequence[Detector], intersect: bool = False) -> Matched:
    """The samples of all runs, paired by data set, file, frame and track.

    Methods, videos and groups are those of the first run that has them. The data set counts only if every file has it.

    Args:
        detectors: as of `load_detectors`.
        intersect: keep the samples that all runs have; otherwise different samples are an error.

    Raises:
        CompareError: a sample that is listed twice, or has two labels, or is absent from a run.
    """
    runs = [run for detector in detectors for run in detector.runs]
    by_set = all(row.dataset for run in runs for row in run.rows)
    tables = [_by_key(run, by_set) for run in runs]
    common = set.intersection(*(set(table) for table in tables))
    everything = set.union(*(set(table) for table in tables))
    if len(common) < len(everything) and not intersect:
        short = [
            f"{run.name} lacks {len(everything) - len(table):,} ({_examples(everything - set(table))})"
            for run, table in zip(runs, tables)
            if len(table) < len(everything)
        ]
        raise CompareError(
            f"the runs did not score the same samples; of {len(everything):,} in all, {'; '.join(short)}: evaluate "
            "them on the same data, or compare what all have with --intersect"
        )
    if not common:
        raise CompareError(
            "no sample is in all runs: the column file (and dataset, frame) must be the same in each file"
        )
    keys = [key for key in tables[0] if key in common]
    rows = []
    for key in keys:
        found = [table[key] for table in tables]
        labels = {row.label for row in found} - {None}
        if len(labels) > 1:
            raise CompareError(f"{key[1]} is real in one score file and fake in another: correct its label")
        known = {name: next((v for row in found if (v := getattr(row, name))), "") for name in _FIELDS}
        rows.append(replace(found[0], label=next(iter(labels), None), **known))
    samples, _ = labelled(rows, "a score file" if len(runs) > 1 else runs[0].name, dataset=UNNAMED)
    scores = {run.path: np.array([table[key].p_fake for key in keys]) for run, table in zip(runs, tables)}
    return Matched(samples, scores, _left_out(runs, [len(table) - len(keys) for table in tables]))


def _left_out(runs: Sequence[Run], counts: Sequence[int]) -> dict[str, int]:
    """Name of each run -> its samples that are not compared; runs of one name have their folder before it."""
    names = [run.name for run in runs]
    shown = [name if names.count(name) == 1 else str(run.path.parent) for run, name in zip(runs, names)]
    return dict(zip(shown, counts))


#: What a row takes from the first file that has it.
_FIELDS = ("dataset", "method", "video", "group")


def _by_key(run: Run, by_set: bool) -> dict[Key, ScoreRow]:
    table: dict[Key, ScoreRow] = {}
    for row in run.rows:
        key = (row.dataset if by_set else "", row.file, row.frame, row.track)
        if key in table:
            raise CompareError(
                f"{run.path} lists {row.file} twice: a row needs its own file, frame or track, to be paired"
            )
        table[key] = row
    return table


def _examples(keys: Iterable[Key]) -> str:
    names = sorted({key[1] for key in keys})
    return ", ".join(names[:_EXAMPLES]) + (", ..." if len(names) > _EXAMPLES else "")
