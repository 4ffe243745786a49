"""`masm predict`: the scores of pictures and videos as files that other programs read.

`scores.csv` (a line an image: `evaluation/score_file.py`), `videos.csv` (a line a file) and `coverage.json` (every file
and frame without a score, with the reason). Results are also noted in `unfinished.jsonl` as they come: an interrupted
command that is repeated goes on after them. Processes of a launcher divide the files, and note theirs in files of their
own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from masm_detect.config import ConfigError
from masm_detect.distributed import processes
from masm_detect.evaluation.score_file import ScoreRow, write_scores, write_table
from masm_detect.hashes import file_sha256, folder_sha256
from masm_detect.journal import Journal, entries_of
from masm_detect.provenance import provenance
from masm_detect.results import check_output_folder, finite, read_json, write_json
from masm_detect.runtime import resolve_precision
from masm_ext.progress import Progress

from .detector import FileScore, ScoreOptions, TrainedDetector, faces_of
from .files import find_files, left_out_files

#: Journals of an unfinished prediction: one for each process.
_JOURNALS = "unfinished*.jsonl"
VIDEO_COLUMNS = (
    *("file", "kind", "frames_wanted", "frames_scored", "tracks", "track", "p_fake", "p_calibrated", "verdict"),
    *("distance", "outside", "reason"),
)
#: Settings that change no score.
_SPEED = ("workers", "batch_size")


@dataclass(frozen=True)
class Prediction:
    """The results of `predict`.

    Attributes:
        files: one for each file, in order
        out: the folder with scores.csv, videos.csv and coverage.json
        calibrated: whether the run has a calibration
    """

    files: list[FileScore]
    out: Path
    calibrated: bool

    @property
    def skipped(self) -> list[FileScore]:
        """The files without a score."""
        return [result for result in self.files if result.p_fake is None]


def predict(
    run: Path | str,
    paths: Sequence[str | Path],
    out: Path | str,
    options: ScoreOptions | None = None,
    *,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> Prediction:
    """Score files with a run, and write the results to `out`.

    Args:
        run: folder written by `masm train`.
        paths: pictures, videos, and folders of them.
        out: folder for the results.
        options: how files are cut and scored; None: the defaults.
        device: cpu, cuda, or auto.
        overwrite: replace the results that `out` holds.
        progress: show a progress bar.

    Returns:
        The results. A file without a score has a reason, and is no error.

    Raises:
        ConfigError: `run` holds no finished run, or `out` holds other results and `overwrite` is not set.
        PredictError: as of `TrainedDetector.predict`.
    """
    out, options = Path(out), options or ScoreOptions()
    check_output_folder(out)
    files = find_files(paths)
    detector = TrainedDetector(run, device)
    settings = _settings(detector, options)
    if overwrite:
        # The old results go first: new scores must not stand beside an old coverage.json.
        (out / "coverage.json").unlink(missing_ok=True)
    elif (out / "coverage.json").exists() and read_json(out / "coverage.json").get("files_scored"):
        raise ConfigError(f"{out} already holds results: give another --out, or --overwrite to replace them")
    with processes(detector.device) as ranks:
        own_journal = out / ("unfinished.jsonl" if ranks.is_first else f"unfinished-{ranks.rank}.jsonl")
        # of all processes, also of an interrupted command with another number of them
        noted = [
            entry for path in sorted(out.glob(_JOURNALS)) if path != own_journal for entry in entries_of(path, settings)
        ]
        ranks.wait()  # journals are written anew below
        with Journal(own_journal, settings, "prediction", overwrite=overwrite) as journal:
            done = {entry["key"]: _result(entry["result"]) for entry in (*noted, *journal.entries)}
            results = {str(file): done[key] for file in files if (key := _key(file)) in done}
            todo = [file for file in files if str(file) not in results]
            own = todo[ranks.rank :: ranks.size]
            shown = progress and ranks.is_first
            bar = Progress(
                total=len(results) + len(own), initial=len(results), unit="file", desc="predict", disable=not shown
            )
            found: list[FileScore] = []
            with bar:
                for result in detector.score_files(own, options):
                    found.append(result)
                    journal.add({"key": _key(Path(result.file)), "result": finite(asdict(result))})
                    bar.update()
        results |= {result.file: result for result in ranks.gather(found)}
        ordered = [results[str(file)] for file in files]
        if ranks.is_first:
            _write(out, ordered, settings, detector, [str(file) for file in left_out_files(paths)])
            for path in out.glob(_JOURNALS):
                path.unlink()
        ranks.wait()
    return Prediction(ordered, out, detector.calibration is not None)


def _write(
    out: Path, results: list[FileScore], settings: dict[str, Any], detector: TrainedDetector, left_out: list[str]
) -> None:
    write_scores(out / "scores.csv", (row for result in results for row in result.rows))
    write_table(out / "videos.csv", VIDEO_COLUMNS, map(_line, results))
    write_json(
        out / "coverage.json",
        {
            "provenance": provenance(str(detector.device)),
            "settings": settings,
            "files": len(results),
            "files_scored": sum(result.p_fake is not None for result in results),
            "frames_wanted": sum(result.wanted for result in results),
            "frames_scored": sum(result.scored for result in results),
            "left_out": left_out,
            "lost_files": [{"file": r.file, "reason": r.reason} for r in results if r.p_fake is None],
            "lost_frames": [
                {"file": r.file, "frame": frame, "reason": reason}
                for r in results
                if r.p_fake is not None
                for frame, reason in r.lost
            ],
            "notes": [f"{r.file}: {note}" for r in results for note in r.notes],
        },
    )


def _line(result: FileScore) -> list[object]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.9g}"

    tracks = len([track for track in result.tracks if track is not None])
    return [
        *(result.file, result.kind, result.wanted, result.scored, tracks),
        "" if result.track is None else result.track,
        *(number(result.p_fake), number(result.calibrated), result.verdict or ""),
        *(number(result.distance), "" if result.distance is None else int(result.outside), result.reason or ""),
    ]


def _settings(detector: TrainedDetector, options: ScoreOptions) -> dict[str, Any]:
    """What decides the scores: the run's weights and the options, without paths."""
    return {
        "run": detector.run.resolve().name,
        "adapter": folder_sha256(detector.run / "adapter"),
        "recipe": None if detector.recipe is None or options.as_is else asdict(detector.recipe),
        "calibration": _calibration_hash(detector.run),
        "device": detector.device.type,  # processes of a launcher have one GPU each
        **{name: value for name, value in asdict(options).items() if name not in _SPEED},
        "faces": faces_of(None if options.as_is else detector.recipe, options),
        "precision": resolve_precision(options.precision, detector.device),
    }


def _calibration_hash(run: Path) -> str | None:
    file = run / "calibration.json"
    return file_sha256(file) if file.is_file() else None


def _key(file: Path) -> str:
    """A file that was not changed since: path, size and time."""
    state = file.stat()
    return f"{file}|{state.st_size}|{state.st_mtime_ns}"


def _result(content: dict[str, Any]) -> FileScore:
    rows = [ScoreRow(**{**row, "box": row["box"] and tuple(row["box"])}) for row in content["rows"]]
    return FileScore(**{**content, "rows": rows, "lost": [tuple(pair) for pair in content["lost"]]})
