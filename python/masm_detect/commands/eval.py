"""`masm eval`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from .arguments import add_config_file, options_of

HELP = "score trained runs on data sets"


def add_arguments(parser: ArgumentParser) -> None:
    """The runs, the data, and the other fields of `config.EvalConfig`."""
    from masm_detect.config import EvalConfig

    add_config_file(parser)
    parser.add_argument("runs", nargs="+", type=str, help="run folders written by `masm train`")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="DeepfakeBench JSON files, or folders with real/ and fake-<method>/",
    )
    parser.add_class_arguments(EvalConfig, skip={"runs", "paths"})


def run(values: Any) -> None:
    """Evaluate, and print the results table."""
    from masm_detect.config import EvalConfig
    from masm_detect.evaluation.evaluate import evaluate
    from masm_detect.report.tables import results_table, show

    options = options_of(values)
    config = EvalConfig(paths=options.pop("data"), **options)
    show(results_table(evaluate(config)["runs"]))
    print(f"written: {config.out}/results.json, {config.out}/auc.png")
