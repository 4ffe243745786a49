"""`masm eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "score trained runs on data sets, or evaluate score files"


def add_arguments(parser: ArgumentParser) -> None:
    """The runs, the data, and the other fields of `config.EvalConfig`."""
    from masm_detect.config import EvalConfig

    add_config_file(parser)
    # by another name than the setting: a positional argument that is not given would empty the list of a config file
    parser.add_argument("run", nargs="*", type=str, default=[], help="run folders written by `masm train`")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="DeepfakeBench JSON files, folders with real/ and fake-<method>/, or Hugging Face data sets (hf:...)",
    )
    parser.add_argument(
        "--scores",
        nargs="+",
        type=str,
        default=[],
        help="score files (CSV) of any program, with the columns file, label and p_fake or logit; need no run, no data",
    )
    parser.add_argument(
        "--overwrite", action=ActionYesNo, nargs="?", default=False, help="replace the results that out already holds"
    )
    parser.add_class_arguments(EvalConfig, skip={"paths", "scores", "overwrite"})


def run(values: Any) -> None:
    """Evaluate, and print the results table."""
    from masm_detect.config import EvalConfig
    from masm_detect.evaluation.evaluate import evaluate
    from masm_detect.report.tables import results_table, show

    options = options_of(values)
    # `--data X RUN` gives --data both: a folder with a run's files is no data set
    data = options.pop("data")
    options["runs"] = [*options["runs"], *options.pop("run"), *(path for path in data if _is_run(path))]
    config = EvalConfig(paths=[path for path in data if not _is_run(path)], **options)
    show(results_table(evaluate(config)["runs"]))
    print(f"written: {config.out}/report.html, results.json, auc.png, and scores.csv and videos.csv of each run")


def _is_run(path: str) -> bool:
    return (Path(path) / "config.yaml").is_file() and not (Path(path) / "real").exists()
