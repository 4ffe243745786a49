"""`masm app`: the report of `masm analyze` in a page of the local browser (gradio)."""

from __future__ import annotations

import html
import os
import tempfile
from pathlib import Path
from typing import Any

from masm_detect.data.sample import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from masm_detect.errors import UserError
from masm_detect.results import ResultError

from .analyze import write_analysis
from .detector import ScoreOptions, TrainedDetector
from .files import find_files

#: Seconds after which uploaded files are deleted; at the end of the program they are, too.
_KEPT = 3600
#: Only programs of this machine can connect.
LOOPBACK = "127.0.0.1"


class AppError(UserError, RuntimeError):
    """The page cannot be served: gradio is not installed, or the port is in use."""


def build_app(detector: TrainedDetector, options: ScoreOptions) -> Any:
    """The page: files in, the report out. Returns `gradio.Blocks`.

    Args:
        detector: the run.
        options: how files are cut and scored.

    Raises:
        AppError: gradio is not installed.
    """
    reports = tempfile.TemporaryDirectory(prefix="masm-")  # removed when the program ends
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    # By default gradio keeps uploads in one folder for all programs, named by their content: the program that ends
    # first deletes what another one still reads.
    os.environ["GRADIO_TEMP_DIR"] = reports.name
    try:
        import gradio
    except ImportError as error:
        raise AppError("masm app needs gradio: pip install 'masm_ext[app]'") from error

    # not track_tqdm: gradio would change the progress bars of the whole process
    bar = gradio.Progress()

    def report(files: list[str] | None, maps: bool, progress: Any = bar) -> tuple[str, Any]:
        if not files:
            raise gradio.Error("Choose at least one picture or video.", print_exception=False)
        folder = Path(tempfile.mkdtemp(dir=reports.name))
        try:
            found = find_files(files)
            write_analysis(
                *(detector, found, folder, options),
                named=files,
                maps=maps,
                done=lambda count: progress((count, len(found)), unit="files"),
            )
        except UserError as error:
            raise gradio.Error(html.escape(str(error)), print_exception=False) from error
        page = (folder / "report.html").read_text(encoding="utf-8")
        # a frame of its own without scripts: names and metadata of a file must not act in this page
        frame = f'<iframe title="report" sandbox srcdoc="{html.escape(page)}" style="width:100%;height:80vh;border:0">'
        return f"{frame}</iframe>", [str(folder / "report.html"), str(folder / "report.json")]

    calibrated = (
        "" if detector.calibration is not None else " It is not calibrated, so it gives scores, but no verdicts."
    )
    with gradio.Blocks(title="masm", analytics_enabled=False, delete_cache=(_KEPT, _KEPT)) as app:
        gradio.Markdown(
            f"# Analyze pictures and videos\nThe detector is the run **{detector.run.resolve().name}**."
            f"{calibrated} Files stay on this computer; they are deleted when the program is ended by Ctrl-C."
        )
        files = gradio.File(
            label="pictures and videos",
            file_count="multiple",
            type="filepath",
            file_types=sorted(IMAGE_SUFFIXES | VIDEO_SUFFIXES),
        )
        maps = gradio.Checkbox(True, label="show where in an image the score comes from (slower)")
        button = gradio.Button("Analyze", variant="primary")
        page = gradio.HTML()
        written = gradio.File(label="the report as files", file_count="multiple", interactive=False)
        button.click(report, [files, maps], [page, written], concurrency_limit=1, api_visibility="private")
    return app


def serve(app: Any, port: int | None, *, browser: bool = True, block: bool = True) -> str:
    """Serve the page on this machine only; returns its address.

    Args:
        app: of `build_app`.
        port: None: the first free one from 7860 on.
        browser: open the page in the browser.
        block: return only when the server ends.

    Raises:
        AppError: the port is in use.
    """
    try:
        _, address, _ = app.launch(
            server_name=LOOPBACK,
            server_port=port,
            share=False,
            inbrowser=browser,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            footer_links=[],
        )
    except (OSError, OverflowError, ValueError) as error:
        which = "no port from 7860 to 7959 can be used" if port is None else f"port {port} cannot be used"
        raise AppError(f"{which} ({error}): give another --port") from error
    if block:
        print(f"{address} (Ctrl-C ends it)")
        app.block_thread()
    return address


def check_run(detector: TrainedDetector, options: ScoreOptions) -> None:
    """Raise UserError now for a run that could not score a file later."""
    if not options.as_is:
        detector.needed_recipe()
    if not os.access(tempfile.gettempdir(), os.W_OK):
        raise ResultError(f"the folder for temporary files, {tempfile.gettempdir()}, cannot be written")
