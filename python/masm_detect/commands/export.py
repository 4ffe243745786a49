"""`masm export`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import add_config_file, options_of

HELP = "write a run as a model for onnxruntime, transformers or masm_ext, with a certificate"


def add_arguments(parser: ArgumentParser) -> None:
    """The run, and the options of `export.export.export_run`."""
    from masm_detect.export.export import export_run

    add_config_file(parser)
    parser.add_argument("run", type=str, help="a run folder written by `masm train`")
    parser.add_argument(
        "--data",
        nargs="+",
        type=str,
        default=[],
        help="the images of the certificate: DeepfakeBench JSON files, folders with real/ and fake-<method>/, or "
        "Hugging Face data sets (hf:...); default: the validation data of the run",
    )
    parser.add_argument(
        "--allow-fewer",
        action=ActionYesNo,
        nargs="?",
        default=False,
        help="accept fewer crops than --images; the certificate states the number",
    )
    parser.add_function_arguments(export_run, skip={"run", "data", "allow_fewer"})


def run(values: Any) -> None:
    """Export, and print the differences."""
    from masm_detect.export.export import export_run

    options = options_of(values)
    certificate = export_run(options.pop("run"), **options)
    crops, limit = certificate["crops"], certificate["limit"]
    found = {"same pixels": certificate["difference_on_the_same_pixels"]}
    found |= {f"image files, {name}": part for name, part in certificate["difference_from_image_files"].items()}
    print(f"largest difference of a logit over {crops['count']} crops ({crops['source']}); limit {limit:g}")
    for name, part in found.items():
        print(f"  {name}: {part['largest']:.2g}{_note(name, part, certificate)}")
    if (needed := certificate["needed_import"]) is not None:
        print(f"needed: import {needed['module']}, before transformers loads the folder: {needed['reason']}")
    print(f"written: {options['out']}")


def _note(name: str, part: dict[str, Any], certificate: dict[str, Any]) -> str:
    checked = name.removeprefix("image files, ") in certificate["checked_against_the_limit"]
    return "" if checked or part["largest"] <= certificate["limit"] else " (above the limit, not checked)"
