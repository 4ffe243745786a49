"""`masm calibrate`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from .arguments import add_flag, options_of

HELP = "learn probabilities and thresholds for a run on validation data"


def add_arguments(parser: ArgumentParser) -> None:
    """The run, the data and the options of `casework.calibrate.calibrate`."""
    from masm_detect.casework.calibrate import calibrate

    parser.add_argument("run", type=str, help="run folder written by `masm train`; the calibration is kept in it")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="data sets that were not trained on; default: the validation split of the run",
    )
    add_flag(parser, "as_is", "do not compare how the images were cut with how the training images were (crops.json)")
    parser.add_function_arguments(calibrate, skip={"run", "paths", "as_is", "progress"})


def run(values: Any) -> None:
    """Calibrate, and print what was learned."""
    from masm_detect.casework.calibrate import calibrate
    from masm_detect.report.calibration import calibration_lines

    options = options_of(values)
    folder, data = options.pop("run"), options.pop("data")
    calibration = calibrate(folder, data, **options)
    for line in calibration_lines(calibration):
        print(line)
    print(f"written: {folder}/calibration.json, {folder}/plots/reliability.png")
