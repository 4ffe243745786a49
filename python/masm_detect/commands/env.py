"""`masm env`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

HELP = "print versions, devices and the implementation of each operator"


def add_arguments(parser: ArgumentParser) -> None:
    """No arguments."""


def run(values: Any) -> None:
    """Print the build of masm_ext and the machine."""
    from masm_detect.provenance import provenance
    from masm_detect.report.tables import mapping_table, show
    from masm_ext import build_info

    show(mapping_table("masm_ext", build_info()))
    show(mapping_table("this machine", provenance()))
