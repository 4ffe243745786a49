"""`masm app`."""

from __future__ import annotations

from typing import Any

from jsonargparse import ActionYesNo, ArgumentParser

from .arguments import options_of

HELP = "analyze pictures and videos in a page of the local browser"


def add_arguments(parser: ArgumentParser) -> None:
    """The run, how files are cut and scored, and where the page is served."""
    from masm_detect.casework.detector import ScoreOptions

    parser.add_argument("run", type=str, help="run folder written by `masm train`")
    parser.add_class_arguments(ScoreOptions)
    parser.add_argument("--device", type=str, default="auto", help="cpu, cuda, or auto")
    parser.add_argument("--port", type=int, default=None, help="port; default: the first free one from 7860 on")
    parser.add_argument("--browser", action=ActionYesNo, nargs="?", default=True, help="open the page in the browser")


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
