"""`masm analyze`: everything that a person needs to judge the score of a picture or video, in one page."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from masm_detect.config import ConfigError
from masm_detect.config_files import to_dict
from masm_detect.data.cutting import Crop
from masm_detect.data.decode import read_image
from masm_detect.data.transforms import transform_image, visible_pixels
from masm_detect.hashes import file_sha256, folder_sha256
from masm_detect.provenance import provenance
from masm_detect.report.analysis_page import PICTURE, analysis_page
from masm_detect.results import check_output_folder, finite, read_json, write_json, write_text
from masm_detect.runtime import resolve_precision
from masm_ext.progress import Progress

from .attribution import OcclusionMap, occlusion_map
from .detector import FileScore, ScoreOptions, TrainedDetector
from .files import find_files, left_out_files
from .media import media_facts
from .quality import quality_warnings

#: Images of a file that are shown: those with the highest P(fake), at most one in so many seconds of a video. The
#: first ones get a map.
_SHOWN, _APART, _MAPPED = 4, 0.5, 2


@dataclass(frozen=True)
class Shown:
    """An image in the report: the crop, what the network saw of it (RGB uint8 [size, size, 3]), its P(fake), and the
    map of it (None: no map was requested).
    """

    crop: Crop
    image: np.ndarray
    p_fake: float
    occlusion: OcclusionMap | None


@dataclass(frozen=True)
class FileAnalysis:
    """All about one file, for the page: the scores, facts about the file, warnings, the images that are shown, and a
    picture reduced to `PICTURE` pixels with its scale (None: a video).
    """

    score: FileScore
    media: dict[str, Any]
    warnings: list[dict[str, str]]
    shown: list[Shown]
    picture: tuple[np.ndarray, float] | None


def analyze(
    run: Path | str,
    paths: Sequence[str | Path],
    out: Path | str,
    options: ScoreOptions | None = None,
    *,
    maps: bool = True,
    device: str = "auto",
    overwrite: bool = False,
    progress: bool = True,
) -> dict[str, Any]:
    """Score files and write `out/report.html` (one file, which loads nothing) and `out/report.json`.

    Args:
        run: folder written by `masm train`.
        paths: pictures, videos, and folders of them.
        out: folder for the report.
        options: how files are cut and scored; None: the defaults.
        maps: show where in an image the score comes from (`attribution.PASSES` passes of the network for each of at
            most two images of a file).
        device: cpu, cuda, or auto.
        overwrite: replace the report that `out` holds.
        progress: show a progress bar.

    Returns:
        The content of report.json.

    Raises:
        ConfigError: `out` holds a report and `overwrite` is not set, or `run` holds no finished run.
        PredictError: as of `TrainedDetector.predict`.
    """
    out, options = Path(out), options or ScoreOptions()
    check_output_folder(out)
    if (out / "report.json").exists() and not overwrite:
        raise ConfigError(f"{out} already holds a report: give another --out, or --overwrite to replace it")
    files = find_files(paths)
    detector = TrainedDetector(run, device)
    return write_analysis(detector, files, out, options, named=paths, maps=maps, progress=progress)


def write_analysis(
    detector: TrainedDetector,
    files: Sequence[Path],
    out: Path,
    options: ScoreOptions,
    *,
    named: Sequence[str | Path],
    maps: bool = True,
    progress: bool = True,
    done: Callable[[int], object] = lambda _: None,
) -> dict[str, Any]:
    """As `analyze`, with a detector that is loaded already; `files`: those that `files.find_files` finds in `named`;
    `done` is called with the number of files after each of them.
    """
    analyses = []
    for result in detector.score_files(files, options, progress=progress, keep_crops=True):
        analyses.append(_analyze_file(detector, result, options, maps, progress))
        done(len(analyses))
    content = finite(
        {
            "format": "masm-detect-analysis",
            "version": 1,
            "command": _command(detector, named, out, options, maps),
            "provenance": provenance(str(detector.device)),
            "precision": resolve_precision(options.precision, detector.device),
            "options": asdict(options),
            "left_out": [str(file) for file in left_out_files(named)],
            "run": _run_facts(detector, options),
            "files": [_for_json(analysis) for analysis in analyses],
        }
    )
    write_text(out / "report.html", analysis_page(content, analyses))
    write_json(out / "report.json", content)
    return content


def _analyze_file(
    detector: TrainedDetector, result: FileScore, options: ScoreOptions, maps: bool, progress: bool
) -> FileAnalysis:
    crops = [] if result.cut is None else result.cut.crops
    media = media_facts(Path(result.file), result.kind)
    recipe, calibration = None if options.as_is else detector.recipe, detector.calibration
    warnings = [] if not crops else [asdict(w) for w in quality_warnings(result, crops, media, recipe, calibration)]
    shown, peaks = [], _peaks(result)
    mapped = min(len(peaks), _MAPPED) if maps else 0
    # a file may take a minute, most of it for its maps; into a log file one line a file is enough
    quiet = not progress or not mapped or not sys.stderr.isatty()
    with Progress(total=mapped, unit="map", desc="maps", leave=False, disable=quiet) as bar:
        for place in peaks:
            occlusion, pixels = None, transform_image(crops[place].rgb, detector.transform)
            if len(shown) < mapped:
                occlusion = occlusion_map(detector.detector, pixels.to(detector.device), options.batch_size)
                bar.update()
            image = visible_pixels(pixels.numpy(), detector.transform)
            shown.append(Shown(replace(crops[place], rgb=image), image, result.rows[place].p_fake, occlusion))
    picture = _reduced(read_image(result.file)) if result.kind == "image" and crops else None
    result.cut = None  # the crops of all files would fill the memory
    return FileAnalysis(result, media, warnings, shown, picture)


def _reduced(rgb: np.ndarray) -> tuple[np.ndarray, float]:
    """A picture of at most `PICTURE` pixels a side, and its scale: whole photographs would fill the memory."""
    scale = min(1.0, PICTURE / max(rgb.shape[:2]))
    size = (max(1, round(rgb.shape[1] * scale)), max(1, round(rgb.shape[0] * scale)))
    return cv2.resize(rgb, size, interpolation=cv2.INTER_AREA), scale


def _peaks(result: FileScore) -> list[int]:
    """Places of the rows that are shown: of the person who decided, the highest P(fake) first."""
    own = [i for i, row in enumerate(result.rows) if result.track is None or row.track == result.track]
    chosen: list[int] = []
    for i in sorted(own, key=lambda i: -result.rows[i].p_fake):
        time = result.rows[i].seconds
        near = [j for j in chosen if time is not None and abs(result.rows[j].seconds - time) < _APART]
        if not near and len(chosen) < _SHOWN:
            chosen.append(i)
    return chosen


def _for_json(analysis: FileAnalysis) -> dict[str, Any]:
    result = analysis.score
    facts = {name: value for name, value in asdict(result).items() if name not in ("cut", "rows")}
    return {
        **facts,
        "tracks": {str(track or ""): mean for track, mean in result.tracks.items()},
        "media": analysis.media,
        "warnings": analysis.warnings,
        "images": [asdict(row) for row in result.rows],
        "maps": [_map_for_json(shown) for shown in analysis.shown if shown.occlusion is not None],
    }


def _map_for_json(shown: Shown) -> dict[str, Any]:
    values = asdict(shown.occlusion)
    return {"frame": shown.crop.frame, "box": shown.crop.box, **values, "values": values["values"].tolist()}


def _run_facts(detector: TrainedDetector, options: ScoreOptions) -> dict[str, Any]:
    """Which detector this was: its settings, the hashes of what decides a score, and what it was calibrated on."""
    run, calibration = detector.run, detector.calibration
    return {
        "name": run.resolve().name,
        "trained_on": _trained_on(run),
        "method": detector.config.method.name,
        "backbone": detector.config.model.backbone,
        "base_sha256": detector.base_sha256,
        "adapter_sha256": folder_sha256(run / "adapter"),
        "config_sha256": file_sha256(run / "config.yaml"),
        "config": to_dict(detector.config),
        "recipe": None if detector.recipe is None or options.as_is else asdict(detector.recipe),
        "calibration": None
        if calibration is None
        else {name: value for name, value in vars(calibration).items() if name != "features"}
        | {"rate_limits": {kind: calibration.rate_limit(kind) for kind in ("fake", "real")}},
    }


def _trained_on(run: Path) -> dict[str, list[str]] | None:
    """Data set -> the forgery methods of the training; None if the run does not record it."""
    groups = run / "groups.json"
    data = read_json(groups).get("train_data") if groups.is_file() else None
    return None if data is None else {name: sorted(entry["methods"]) for name, entry in data.items()}


def _command(
    detector: TrainedDetector, named: Sequence[str | Path], out: Path, options: ScoreOptions, maps: bool
) -> str:
    """The command that repeats this report, with every option that is not the default."""
    default = ScoreOptions()
    words = [
        "masm",
        "analyze",
        str(detector.run),
        *map(str, named),
        "--out",
        str(out),
        "--device",
        str(detector.device),
    ]
    options = replace(options, precision=resolve_precision(options.precision, detector.device))
    for name, value in asdict(options).items():
        if value != getattr(default, name):
            words += ["--as-is"] if name == "as_is" else [f"--{name}", str(value)]
    return shlex.join([*words, *([] if maps else ["--no_maps"])])
