"""Which test sets a run was scored on, and how often: `test_sets.json` in the run folder.

A test set is opened once: whoever looks at its results and changes a setting has chosen that setting on the test set.
Nothing is forbidden here; every evaluation is counted, and the results show the count.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import yaml

from masm_detect.data.content_cache import Content
from masm_detect.data.sample import Sample
from masm_detect.results import ResultError, read_json, write_json
from masm_ext.files import locked

FILE = "test_sets.json"
FORMAT, VERSION = "masm-detect-test-sets", 1
#: Splits that are no test: they are recorded, and not counted.
_NO_TEST = ("train", "val")


def record_evaluation(
    folder: Path | str,
    samples: Sequence[Sample],
    contents: Sequence[Content],
    *,
    out: Path | str,
    evaluation: str,
    protocol: str | None = None,
) -> list[dict[str, Any]]:
    """Append an evaluation to `test_sets.json` of a run folder; a folder that cannot be written gives a warning.

    Args:
        folder: the run folder.
        samples: what was scored, n samples.
        contents: those of their files (`data.contents.read_contents`), [n].
        out: the folder of the results; only its name is kept.
        evaluation: the same for all runs that one command scores; these do not count for each other.
        protocol: the name of the protocol, if there is one.

    Returns:
        One entry for each data set and split: {"time_utc", "evaluation", "dataset", "split": None where the data has
        none, "samples", "fingerprint": SHA-256 over the labels and contents of its files, "out", "protocol",
        "opened_before": earlier evaluations of this run on it, "opened_by_siblings": those of other runs beside it that
        were trained on the same data}. A data set is known by its name and split, or by its fingerprint. The counts are
        None for the splits train and val, which are no test sets, and "opened_before" where the record cannot be read.
    """
    folder, now = Path(folder), datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = _parts(samples, contents)
    entries = [
        {
            "time_utc": now,
            "evaluation": evaluation,
            "dataset": dataset,
            "split": split or None,
            **numbers,
            "out": Path(out).resolve().name,
        }
        | {"protocol": protocol}
        for (dataset, split), numbers in found.items()
    ]
    siblings = [entry for path in _siblings(folder) for entry in _read_or_none(path) or ()]
    try:
        with locked(folder):
            earlier = _read(folder)
            content = {"format": FORMAT, "version": VERSION, "evaluations": [*earlier, *entries]}
            write_json(folder / FILE, content)
    except (OSError, ResultError) as error:
        earlier = _read_or_none(folder)
        reason = getattr(error, "strerror", None) or error
        warnings.warn(f"this evaluation is not recorded in {folder / FILE}: {reason}", stacklevel=2)
    return [
        entry
        | {
            "opened_before": None if earlier is None or not _is_test(entry) else _count(entry, earlier),
            "opened_by_siblings": _count(entry, siblings) if _is_test(entry) else None,
        }
        for entry in entries
    ]


def _parts(samples: Sequence[Sample], contents: Sequence[Content]) -> dict[tuple[str, str], dict[str, Any]]:
    """(data set, split) -> number of samples and fingerprint, which depends on no path and no order."""
    lines: dict[tuple[str, str], list[str]] = {}
    for sample, content in zip(samples, contents):
        lines.setdefault((sample.dataset, sample.split), []).append(f"{sample.label} {content.fingerprint}")
    return {
        key: {"samples": len(part), "fingerprint": hashlib.sha256("\n".join(sorted(part)).encode()).hexdigest()}
        for key, part in sorted(lines.items())
    }


def _is_test(entry: dict[str, Any]) -> bool:
    return entry["split"] not in _NO_TEST


def _count(entry: dict[str, Any], others: Sequence[dict[str, Any]]) -> int:
    """Other evaluations among `others` on the data set and split, or the files, of `entry`."""
    return len({
        other["evaluation"]
        for other in others
        if (other["dataset"], other["split"]) == (entry["dataset"], entry["split"])
        or other["fingerprint"] == entry["fingerprint"]
    } - {entry["evaluation"]})  # fmt: skip


def _read(folder: Path) -> list[dict[str, Any]]:
    """The evaluations that a run folder records. Raises ResultError for a file that cannot be read."""
    if not (folder / FILE).is_file():
        return []
    content = read_json(folder / FILE)
    entries = content.get("evaluations") if isinstance(content, dict) else None
    needed = {"evaluation", "dataset", "split", "fingerprint"}
    if not isinstance(entries, list) or not all(isinstance(e, dict) and needed <= set(e) for e in entries):
        raise ResultError(f"{folder / FILE} is no record of evaluations; move it away to begin a new one")
    return entries


def _read_or_none(folder: Path) -> list[dict[str, Any]] | None:
    try:
        return _read(folder)
    except ResultError:
        return None


def _siblings(folder: Path) -> list[Path]:
    """Other run folders in the same folder that record evaluations and were trained on the same data."""
    folder, own = folder.resolve(), _training_data(folder)
    try:
        beside = sorted(path for path in folder.parent.iterdir() if path != folder and (path / FILE).is_file())
    except OSError:  # it may not be listed
        return []
    return [path for path in beside if own is not None and _training_data(path) == own]


def _training_data(folder: Path) -> tuple[Any, ...] | None:
    """Paths, methods and compression of the training data of a run; None: a folder that is no run."""
    try:
        data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
        return tuple(data.get(name) for name in ("paths", "methods", "compression"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None
