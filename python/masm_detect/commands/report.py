"""`masm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "show what a run learned and where, as an HTML page: masks, subspaces, drift"


def add_arguments(parser: ArgumentParser) -> None:
    """The run, the page, and the options of `run_report.collect.run_report`."""
    from masm_detect.run_report.collect import run_report

    add_config_file(parser)
    parser.add_argument("run", type=str, help="a run folder written by `masm train`")
    parser.add_argument(
        "--out",
        type=str,
        default=None,
        help="the page to write, a name that ends in .html; the numbers go to a .json file beside it; null: "
        "report.html in the run folder",
    )
    parser.add_argument(
        "--overwrite", action=ActionYesNo, nargs="?", default=False, help="replace a report that is there already"
    )
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="the images on which subspaces are switched off: DeepfakeBench JSON files, folders with real/ and "
        "fake-<method>/, or Hugging Face data sets (hf:...); default: the validation data of the run",
    )
    parser.add_function_arguments(run_report, skip={"run", "data"})


def run(values: Any) -> None:
    """Collect the numbers, and write the page and the JSON file."""
    from masm_detect.errors import ConfigError
    from masm_detect.report.run_page import run_page
    from masm_detect.results import check_output_folder, finite, write_json, write_text
    from masm_detect.run_report.collect import run_report

    options = options_of(values)
    folder, out, overwrite = options.pop("run"), options.pop("out"), options.pop("overwrite")
    page = Path(folder) / "report.html" if out is None else Path(out)
    if page.suffix != ".html":
        raise ConfigError(f"out is {out!r}; it must be the name of a page, which ends in .html")
    numbers = page.with_suffix(".json")
    check_output_folder(page.parent)
    for file in (page, numbers):
        if file.name in (
            "metrics.json",
            "results.json",
            "groups.json",
            "environment.json",
            "calibration.json",
            "crops.json",
        ):
            raise ConfigError(f"out is {page}, whose numbers would replace {file.name} of a run: give another name")
    if (page.exists() or numbers.exists()) and not overwrite:
        raise ConfigError(
            f"{page} or {numbers.name} is there already: give another --out, or --overwrite to replace it"
        )
    report = finite(run_report(folder, **options))
    write_json(numbers, report)
    write_text(page, run_page(report))
    print(f"written: {page}, {numbers}")
