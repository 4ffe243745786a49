"""`masm robustness`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "measure how distortions of the images change the scores of a trained run"

#: Settings of `EvalConfig` that are given by other names, or mean nothing here.
_SKIP = {
    "runs",
    "paths",
    "scores",
    "out",
    "overwrite",
    "protocol",
    "video_key",
    "data_root",
    "parameters",
    "other_training",
}


def add_arguments(parser: ArgumentParser) -> None:
    """The run, the data, and the fields of `RobustnessConfig` and `config.EvalConfig`."""
    from masm_detect.config import EvalConfig
    from masm_detect.robustness.robustness import RobustnessConfig

    add_config_file(parser)
    parser.add_argument("run", type=str, help="run folder written by `masm train`")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="data sets as in `masm eval`, or folders of raw pictures and videos in real/ and fake-<method>/",
    )
    parser.add_argument("--out", type=str, default="robustness", help="folder for the results")
    parser.add_argument(
        "--overwrite", action=ActionYesNo, nargs="?", default=False, help="replace the results that out already holds"
    )
    for name, what in _FLAGS.items():
        default = None if name == "raw" else False  # not given: a folder with videos is raw
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=default, help=what)
    parser.add_class_arguments(RobustnessConfig, skip=set(_FLAGS))
    parser.add_class_arguments(EvalConfig, skip=_SKIP)


_FLAGS = {
    "quick": "one level of each distortion, the middle one",
    "raw": "the data are raw pictures and videos, which are distorted before they are cut; a folder with videos is "
    "taken so without it",
}


def run(values: Any) -> None:
    """Score the run under all distortions, and print a table for each data set."""
    from dataclasses import fields

    from masm_detect.config import EvalConfig
    from masm_detect.report.robustness_page import robustness_table
    from masm_detect.report.tables import show
    from masm_detect.robustness.robustness import RobustnessConfig, robustness

    given = options_of(values)
    options = {field.name: given.pop(field.name) for field in fields(RobustnessConfig)}
    folder, data = given.pop("run"), given.pop("data")
    content = robustness(EvalConfig(runs=[folder], paths=data, **given), RobustnessConfig(**options))
    for dataset, entry in content["datasets"].items():
        show(robustness_table(dataset, entry))
    out = given["out"]
    print(f"written: {out}/robustness.html, robustness.json, scores.csv, grid.png, curves.png")
