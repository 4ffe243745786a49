"""`masm compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "compare detectors that scored the same samples"


def add_arguments(parser: ArgumentParser) -> None:
    """The evaluations, the folder of the report, and the options of `evaluation.comparison.compare`."""
    from masm_detect.evaluation.comparison import compare

    add_config_file(parser)
    parser.add_argument(
        "evals",
        nargs="*",
        type=str,
        default=[],
        metavar="EVAL",
        help="folders written by `masm eval`, folders of runs in them, or score files (CSV) of any program",
    )
    parser.add_argument("--out", type=str, default="compare", help="the folder to write")
    for name, text in (
        ("overwrite", "replace the comparison that out already holds"),
        ("intersect", "compare the samples that all have; without it, different samples are an error"),
    ):
        parser.add_argument(f"--{name}", action=ActionYesNo, nargs="?", default=False, help=text)
    parser.add_argument(
        "--group",
        type=list[str],
        default=[],
        metavar="NAME=EVAL,EVAL",
        help="runs that are the seeds of one detector (may be repeated); without it, runs named alike but for a seed "
        "(NAME-seed1)",
    )
    parser.add_function_arguments(compare, skip={"evals", "group", "intersect"})


def complete(arguments: list[str]) -> list[str]:
    """Each `--group NAME=...` adds to the list: jsonargparse would keep the last one alone."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1] == "--group":
            found[-1] = f"--group+={argument}"
        else:
            found.append(f"--group+={argument[8:]}" if argument.startswith("--group=") else argument)
    return found


def run(values: Any) -> None:
    """Compare, print the table and the verdicts, and write the report."""
    from masm_detect.errors import ConfigError
    from masm_detect.evaluation.comparison import compare
    from masm_detect.report.compare import comparison_page, comparison_tables, forest_figure
    from masm_detect.report.plots import save_figure
    from masm_detect.report.tables import show
    from masm_detect.results import check_output_folder, write_json, write_text

    options = options_of(values)
    evals, out, overwrite = options.pop("evals"), Path(options.pop("out")), options.pop("overwrite")
    check_output_folder(out)
    if (out / "compare.json").exists() and not overwrite:
        raise ConfigError(f"{out} already holds a comparison: give another --out, or --overwrite to replace it")
    content = compare(evals, **options)
    save_figure(forest_figure(content), out / "compare.png")
    write_text(out / "compare.html", comparison_page(content))
    write_json(out / "compare.json", content)
    for table in comparison_tables(content):
        show(table)
    for note in content["notes"]:
        print(f"note: {note}")
    print(f"written: {out}/compare.html, compare.json, compare.png")
