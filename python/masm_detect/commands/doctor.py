"""`masm doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "examine data sets before training: leaks, copies, damaged files, shortcuts"


def add_arguments(parser: ArgumentParser) -> None:
    """The data, the folder of the report, and the options of `doctor.examine.examine`."""
    from masm_detect.doctor.examine import examine

    add_config_file(parser)
    parser.add_argument(
        "data",
        nargs="+",
        type=str,
        help="DeepfakeBench JSON files, folders with real/ and fake-<method>/, or Hugging Face data sets (hf:...)",
    )
    parser.add_argument(
        "--out", type=str, default=None, help="the folder to write report.html and report.json to; null: none"
    )
    parser.add_argument(
        "--overwrite", action=ActionYesNo, nargs="?", default=False, help="replace the report that out already holds"
    )
    parser.add_function_arguments(examine, skip={"paths"})


def run(values: Any) -> int:
    """Examine, print the findings and write the report; 1 if there is an error among them."""
    from masm_detect.doctor.examine import examine
    from masm_detect.errors import ConfigError
    from masm_detect.report.doctor import doctor_lines, doctor_tables
    from masm_detect.report.doctor_page import doctor_page
    from masm_detect.report.tables import show
    from masm_detect.results import check_output_folder, write_json, write_text

    options = options_of(values)
    data, out, overwrite = options.pop("data"), options.pop("out"), options.pop("overwrite")
    if out is not None:
        check_output_folder(out)
        if (Path(out) / "report.json").exists() and not overwrite:
            raise ConfigError(f"{out} already holds a report: give another --out, or --overwrite to replace it")
    report = examine(data, **options)
    for table in doctor_tables(report):
        show(table)
    print("\n".join(doctor_lines(report)))
    if out is not None:
        write_json(Path(out) / "report.json", report)
        write_text(Path(out) / "report.html", doctor_page(report))
        print(f"written: {out}/report.html, {out}/report.json")
    return 1 if report["errors"] else 0
