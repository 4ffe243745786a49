"""`masm app`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ArgumentParser

from .arguments import add_flag, options_of
from .predict import add_scoring

HELP = "analyze pictures and videos in a page of the local browser"


def add_arguments(parser: ArgumentParser) -> None:
    """The run, how files are cut and scored, and where the page is served."""
    parser.add_argument("run", type=str, help="run folder written by `masm train`")
    add_scoring(parser)
    parser.add_argument("--port", type=int, default=None, help="port; default: the first free one from 7860 on")
    add_flag(parser, "browser", "open the page in the browser", default=True)


def run(values: Any) -> None:
    """Serve the page until Ctrl-C."""
    from masm_detect.casework.app import build_app, check_run, serve
    from masm_detect.casework.detector import ScoreOptions, load_detector

    given = options_of(values)
    folder, device, port, browser = (given.pop(name) for name in ("run", "device", "port", "browser"))
    options = ScoreOptions(**given)
    detector = load_detector(folder, device)
    check_run(detector, options)
    serve(build_app(detector, options), port, browser=browser)
