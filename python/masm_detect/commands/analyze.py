"""`masm analyze`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from .arguments import add_flag, options_of
from .predict import add_files

HELP = "report on pictures and videos: verdict, timeline, maps, provenance, in one HTML file"


def add_arguments(parser: ArgumentParser) -> None:
    """The arguments of `masm predict`, and whether maps are made."""
    add_files(parser)
    parser.add_argument("--out", type=str, default="analysis", help="folder for report.html and report.json")
    add_flag(parser, "overwrite", "replace the report in --out")
    add_flag(
        parser,
        "maps",
        "show where in an image the score comes from (about 150 passes of the network for each of at most two images "
        "of a file)",
        default=True,
    )


def run(values: Any) -> int:
    """Write the report and print the verdicts; 3 if some files have no score."""
    from masm_detect.casework.analyze import analyze
    from masm_detect.casework.detector import ScoreOptions
    from masm_detect.commands.main import FILES_SKIPPED
    from masm_detect.report.casework import VERDICTS

    given = options_of(values)
    names = ("run", "files", "out", "overwrite", "device", "maps")
    folder, files, out, overwrite, device, maps = (given.pop(name) for name in names)
    content = analyze(folder, files, out, ScoreOptions(**given), maps=maps, device=device, overwrite=overwrite)
    for file in content["files"]:
        value = file["p_fake"] if file["calibrated"] is None else file["calibrated"]
        kind = "raw" if file["calibrated"] is None else "calibrated"
        score = "" if value is None else f" ({kind} score {value:.3f})"
        print(f"{file['file']}: {VERDICTS[file['verdict']]}{score or ': ' + file['reason']}")
        for warning in file["warnings"]:
            print(f"  caution: {warning['text']}")
    print(f"written: {out}/report.html, {out}/report.json")
    return FILES_SKIPPED if any(file["p_fake"] is None for file in content["files"]) else 0
