"""Result files: the format name and version, and reading a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from masm_detect.results import ResultError, read_json

FORMAT = "masm_ext benchmark"
FORMAT_VERSION = 2


def open_results(out: Path, settings: dict[str, Any], resume: bool) -> dict[str, Any]:
    """The results to add to: new ones, or those of `out` with `resume`.

    Raises ResultError if `out` exists and `resume` is off, or if it was made with other settings.
    """
    if not out.exists():
        return {"format": FORMAT, "format_version": FORMAT_VERSION, "settings": settings, "launches": [], "cases": {}}
    if not resume:
        raise ResultError(f"{out} exists: --resume goes on with it, --out names another file")
    results = load_results(out)
    if results["settings"] != settings:
        differ = sorted(k for k in settings if results["settings"].get(k) != settings[k])
        raise ResultError(f"{out} was made with other settings ({', '.join(differ)}); give another --out")
    return results


def load_results(path: Path | str) -> dict[str, Any]:
    """A result file; raises ResultError for anything else."""
    results = read_json(path)
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        raise ResultError(f"{path} is not a result of benchmarks/speed/run.py (no format {FORMAT!r})")
    if results.get("format_version") != FORMAT_VERSION:
        raise ResultError(f"{path} has format version {results.get('format_version')}, this program {FORMAT_VERSION}")
    return results
