"""`masm prepare`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from .arguments import add_config_file, options_of

HELP = "cut faces out of videos or images, write a DeepfakeBench JSON"


def add_arguments(parser: ArgumentParser) -> None:
    """The source and output folders, and the options of `data.prepare.prepare`."""
    from masm_detect.data.prepare import prepare

    add_config_file(parser)
    parser.add_argument("source", type=str, help="folder with real/ and fake-<method>/")
    parser.add_argument("out", type=str, help="folder for the crops, the JSON and the report")
    parser.add_function_arguments(prepare, skip={"source", "out"})


def run(values: Any) -> None:
    """Prepare the data set and print the report."""
    from masm_detect.data.prepare import prepare

    print(prepare(**options_of(values)))
