"""`masm train`."""

from __future__ import annotations

import os
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "train a detector; writes a run folder"


def add_arguments(parser: ArgumentParser) -> None:
    """The fields of `config.TrainConfig`."""
    from masm_detect.config import TrainConfig

    add_config_file(parser)
    parser.add_class_arguments(TrainConfig, skip={"resume"})
    parser.add_argument(
        "--resume", action=ActionYesNo, nargs="?", default=False, help="continue the interrupted run in --out"
    )


def complete(arguments: list[str]) -> list[str]:
    """The arguments of `masm train`; with `--resume`, the config file of the run in `--out` is inserted before them.

    So `--out` and `--resume` suffice. Any other setting must equal that of the run.
    """
    if not any(word.partition("=")[0] == "--resume" and word != "--resume=false" for word in arguments):
        return arguments
    places = [i for i, word in enumerate(arguments) if word.partition("=")[0] == "--out"]
    if not places:
        return arguments
    _, equals, out = arguments[places[-1]].partition("=")
    out = out if equals else (arguments[places[-1] + 1 : places[-1] + 2] or [""])[0]
    config = os.path.join(out, "config.yaml")
    return ["--config", config, *arguments] if os.path.isfile(config) else arguments


def run(values: Any) -> None:
    """Train, and print the source-validation table and the throughput."""
    from masm_detect.config import TrainConfig
    from masm_detect.report.tables import masks_line, results_table, show, speed_line
    from masm_detect.training.run import train

    config = TrainConfig(**options_of(values))
    result = train(config)
    show(results_table({result.method.name: result.metrics["source_validation"]}))
    print(speed_line(result.metrics))
    if line := masks_line(result.metrics, config.method.masm):
        print(line)
    print(f"these numbers are of the validation split; run folder: {result.folder} (score it with masm eval)")
