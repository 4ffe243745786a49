"""`masm predict`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from .arguments import add_flag, options_of

HELP = "score pictures and videos with a trained run"


def add_arguments(parser: ArgumentParser) -> None:
    """The run, the files, and the fields of `casework.detector.ScoreOptions`."""
    add_files(parser)
    parser.add_argument(
        "--out", type=str, default="predictions", help="folder for scores.csv, videos.csv, coverage.json"
    )
    add_flag(parser, "overwrite", "replace the results in --out")


def add_files(parser: ArgumentParser) -> None:
    """The run and the files, and how they are cut and scored: for every command that scores files."""
    parser.add_argument("run", type=str, help="run folder written by `masm train`")
    parser.add_argument("files", nargs="+", type=str, help="pictures, videos, or folders of them")
    add_scoring(parser)


def add_scoring(parser: ArgumentParser) -> None:
    """How files are cut and scored."""
    from masm_detect.casework.detector import ScoreOptions

    add_flag(parser, "as_is", "score every picture and frame as it is: it is a crop already")
    parser.add_class_arguments(ScoreOptions, skip={"as_is"})
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")


def run(values: Any) -> int:
    """Score the files and print a table; 3 if some have no score."""
    from masm_detect.casework.detector import ScoreOptions
    from masm_detect.casework.predict import predict
    from masm_detect.commands.main import FILES_SKIPPED
    from masm_detect.report.casework import prediction_table, skipped_lines
    from masm_detect.report.tables import show

    given = options_of(values)
    folder, files, out, overwrite, device = (given.pop(n) for n in ("run", "files", "out", "overwrite", "device"))
    done = predict(folder, files, out, ScoreOptions(**given), device=device, overwrite=overwrite)
    if len(done.skipped) < len(done.files):
        show(prediction_table(done.files))
    for line in skipped_lines(done.skipped):
        print(line)
    if not done.calibrated:
        print(
            "uncalibrated: scores order the files, and are no probabilities; run `masm calibrate` with "
            f"{folder} for verdicts"
        )
    print(f"written: {out}/scores.csv, {out}/videos.csv, {out}/coverage.json")
    return FILES_SKIPPED if done.skipped else 0
