"""`masm robustness`: the scores of a run on clean and on distorted material, and what the distortions cost."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from masm_detect.casework.detector import TrainedDetector, check_detector
from masm_detect.config import ConfigError, EvalConfig
from masm_detect.config_files import to_dict
from masm_detect.data.crop_recipe import TILES, CropRecipe, check_same_crops
from masm_detect.data.decode import byte_size
from masm_detect.data.faces import FaceDetector
from masm_detect.data.hf_images import is_key
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.sample import Sample
from masm_detect.data.samples import Samples
from masm_detect.data.videos import VideoSource
from masm_detect.distortions.registry import Cell, choose_cells
from masm_detect.distortions.videos import ENCODERS, check_encoder
from masm_detect.errors import require_setting
from masm_detect.evaluation.evaluate import samples_of
from masm_detect.evaluation.score_file import COLUMNS, ScoreRow, score_fields, sigmoid, write_table
from masm_detect.hashes import folder_sha256
from masm_detect.provenance import provenance
from masm_detect.report.plots import save_figure
from masm_detect.report.robustness_figures import curves_figure, grid_figure
from masm_detect.report.robustness_page import robustness_page
from masm_detect.results import check_output_folder, prepare_outputs, write_json, write_text
from masm_detect.runtime import process_settings

from .crops import score_crops
from .measure import CellScores, measure_cells
from .parts import JOURNAL, Network, PartJournal, PartScores
from .raw import BEFORE, BEHIND, holds_videos, raw_material, score_raw

#: Frames of a raw video if their number is not given: faces are found in each of them once for each cell.
RAW_FRAMES = 8


@dataclass(frozen=True)
class RobustnessConfig:
    """What is distorted, and how.

    Attributes:
        cells: distortions and levels, separated by commas, e.g. jpeg:50,blur; also the suites deeperforensics, pictures
            and codecs; null: all of them
        quick: one level of each distortion, the middle one
        raw: the data are raw pictures and videos, which are distorted before faces are cut out of them as for training;
            null: if a folder holds videos
        tiles: for raw material and runs trained on tiles: most tiles of a frame
        seed: of the random distortions
    """

    cells: str | None = None
    quick: bool = False
    raw: bool | None = None
    tiles: int = TILES
    seed: int = 0

    def __post_init__(self) -> None:
        require_setting(self.tiles >= 1, "tiles", self.tiles, "at least 1")
        require_setting(self.seed >= 0, "seed", self.seed, "0 or more")
        choose_cells(self.cells)


@dataclass(frozen=True)
class _Material:
    """What is scored.

    Attributes:
        samples: the images; of raw material the files
        files: of raw material; None: ready crops
        recipe: how raw material is cut
    """

    samples: Sequence[Sample]
    files: Sequence[VideoSource] | None = None
    recipe: CropRecipe | None = None

    def sample(self, part: int, image: int) -> Sample:
        """The sample of an image of a part."""
        return self.samples[image if self.files is None else part]

    def row(self, part: int, image: int, logit: float, seconds: Any, track: Any, box: Any) -> ScoreRow:
        """The row of a scored crop."""
        sample, path, frame = self.sample(part, image), None, None
        if self.files is not None:
            file = self.files[part]
            path = str(file.files[0] if file.is_video else file.files[image])
            frame = image if file.is_video else None
        return ScoreRow(
            path or sample.path, logit, sigmoid(logit), sample.label, sample.dataset, sample.method, sample.video,
            sample.group, frame, seconds, track, None if box is None else tuple(box),
        )  # fmt: skip


def robustness(config: EvalConfig, options: RobustnessConfig | None = None) -> dict[str, Any]:
    """Score a run on its material, clean and distorted, and write the results to `config.out`.

    Written are robustness.json, scores.csv (columns distortion and level before those of `evaluation.score_file`),
    grid.png, curves.png and robustness.html. An interrupted call that is repeated goes on where it was.

    Args:
        config: one run, data sets (or folders of raw material), output folder; the settings are those of `masm eval`.
        options: the distortions; None: all.

    Returns:
        The content of robustness.json: {"provenance", "run", "config", "options", "datasets": {name:
        `measure.measure_cells`}}.

    Raises:
        ConfigError: not one run, no data, or `config.out` holds results and `config.overwrite` is not set, or
            unfinished ones with other settings.
        DistortionError, CodecError: a distortion that does not exist, or an encoder that is not installed.
        RecipeError, PredictError, DatasetError, PrepareError, UnreadableImage: the run or the data cannot be used.
    """
    options = options or RobustnessConfig()
    if len(config.runs) != 1 or config.scores:
        raise ConfigError(f"runs is {config.runs}: name one run folder written by `masm train`")
    check_output_folder(config.out)
    out, cells = Path(config.out), choose_cells(options.cells, options.quick)
    if (out / "robustness.json").exists() and not config.overwrite:
        raise ConfigError(f"{config.out} already holds results: give another --out, or --overwrite to replace them")
    names = ("scores.csv", "grid.png", "curves.png", "robustness.html", "robustness.json")
    prepare_outputs([out / name for name in names], overwrite=config.overwrite)
    for encoder in {ENCODERS[cell.distortion.apply] for cell in cells if cell.video}:
        check_encoder(encoder)
    with process_settings(config.runtime) as device:
        trained = TrainedDetector(config.runs[0], str(device))
        network = Network(trained, config.runtime.precision, config.runtime.eval_batch_size)
        material, faces = _material(config, options, trained)
        settings = _settings(config, options, network, material, cells)
        with PartJournal(out / JOURNAL, settings, config.overwrite) as journal:
            common = {"seed": options.seed, "progress": config.runtime.progress}
            if material.files is None:
                score_crops(material.samples, cells, network, journal, workers=config.runtime.workers, **common)
            else:
                score_raw(
                    *(material.files, material.samples, cells, network, journal, material.recipe, faces),
                    frames_per_video=config.frames_per_video or RAW_FRAMES, tiles=options.tiles, **common,
                )  # fmt: skip
        content = {
            "provenance": provenance(str(device)),
            "run": {"name": trained.run.resolve().name, "method": trained.config.method.name,
                    "adapter": folder_sha256(trained.run / "adapter"), "calibrated": trained.calibration is not None},
            "config": to_dict(replace(config, runs=[trained.run.name])),
            "options": asdict(options),
            "settings": {key: value for key, value in settings.items() if key not in ("run", "adapter")},
            "datasets": {
                dataset: measure_cells(_collected(material, journal, cells, dataset), trained.calibration)
                for dataset in sorted({sample.dataset for sample in material.samples})
            },
        }  # fmt: skip
    _write(out, content, material, journal, cells)
    (out / JOURNAL).unlink()
    return content


#: Settings that have a meaning for data sets of ready crops only.
_OF_CROPS = ("root", "prefix_map", "compression", "label_map", "video_pattern", "missing", "hf")


def _material(
    config: EvalConfig, options: RobustnessConfig, trained: TrainedDetector
) -> tuple[_Material, FaceDetector | None]:
    raw = any(holds_videos(path) for path in config.paths) if options.raw is None else options.raw
    if not raw:
        if not config.as_is:
            check_same_crops(trained.recipe, config.paths, trained.run.name)
        return _Material(Samples(samples_of(config))), None
    if not config.paths:
        raise ConfigError("no data given: name a folder with real/ and fake-<method>/")
    default = EvalConfig()
    if ignored := [name for name in _OF_CROPS if getattr(config, name) != getattr(default, name)]:
        raise ConfigError(f"{', '.join(ignored)} select ready crops, and have no meaning for raw files: leave them out")
    recipe = None if config.as_is else trained.needed_recipe()
    faces = None
    if recipe is not None and recipe.region == "face":
        faces = MtcnnDetector()
        check_detector(recipe, faces, trained.run.name)
    files, samples = raw_material(config.paths, config.split)
    return _Material(samples, files, recipe), faces


def _settings(
    config: EvalConfig, options: RobustnessConfig, network: Network, material: _Material, cells: Sequence[Cell]
) -> dict[str, Any]:
    """What decides the scores."""
    raw = material.files is not None
    return {
        "run": network.trained.run.resolve().name,
        "adapter": folder_sha256(network.trained.run / "adapter"),
        "data": _state(material),
        "cells": [cell.name for cell in cells],
        "seed": options.seed,
        "raw": raw,
        "recipe": None if material.recipe is None else asdict(material.recipe),
        "frames_per_video": (config.frames_per_video or RAW_FRAMES) if raw else config.frames_per_video,
        "tiles": options.tiles if raw else None,
        "clip": {"before": BEFORE, "behind": BEHIND} if raw else None,
        "batch_size": network.batch_size,
        "precision": network.precision,
        "device": network.trained.device.type,
    }


def _state(material: _Material) -> str:
    """A hash of names, labels, sizes and times of the files."""
    digest = hashlib.sha256()
    paths: list[tuple[str, Sample]] = [(sample.path, sample) for sample in material.samples]
    if material.files is not None:
        paths = [(str(path), s) for file, s in zip(material.files, material.samples) for path in file.files]
    for path, sample in paths:
        state = f"{byte_size(path)}" + ("" if is_key(path) else f"|{os.stat(path).st_mtime_ns}")
        digest.update(f"{path}|{sample.label}|{sample.video}|{sample.group}|{state}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _results(journal: PartJournal, cell: Cell) -> list[PartScores]:
    return [journal.done[key] for key in sorted(key for key in journal.done if key[1] == cell.name)]


def _collected(material: _Material, journal: PartJournal, cells: Sequence[Cell], dataset: str) -> list[CellScores]:
    """The scores of a data set in each cell. An image of several crops has their mean P(fake)."""
    found = []
    for cell in cells:
        own = CellScores(cell)
        for result in _results(journal, cell):
            if material.files is not None and material.samples[result.part].dataset != dataset:
                continue
            if result.reason is not None:
                own.files_lost[result.reason] += 1
            crops: dict[int, list[float]] = {}
            for image, logit, *_ in result.rows:
                crops.setdefault(image, []).append(sigmoid(logit))
            here = {i: s for i in result.wanted if (s := material.sample(result.part, i)).dataset == dataset}
            own.wanted |= {(result.part, image): sample for image, sample in here.items()}
            for image, scores in crops.items():
                if image in here:
                    own.scores[result.part, image] = sum(scores) / len(scores)
                    own.samples[result.part, image] = here[image]
            own.lost.update(reason for image, reason in result.lost if image in here)
            own.skipped.update(
                reason for image, reason in result.skipped if material.sample(result.part, image).dataset == dataset
            )
            own.unchanged += sum(image in here and image in crops for image in result.unchanged)
        found.append(own)
    return found


def _lines(material: _Material, journal: PartJournal, cells: Sequence[Cell]) -> Iterator[list[object]]:
    for cell in cells:
        name = "clean" if cell.distortion is None else cell.distortion.name
        for result in _results(journal, cell):
            for crop in result.rows:
                yield [name, cell.level, *score_fields(material.row(result.part, *crop))]


def _write(
    out: Path, content: dict[str, Any], material: _Material, journal: PartJournal, cells: Sequence[Cell]
) -> None:
    write_table(out / "scores.csv", ("distortion", "level", *COLUMNS), _lines(material, journal, cells))
    several = len(content["datasets"]) > 1
    for dataset, entry in content["datasets"].items():
        end = f"-{dataset.replace('/', '_')}" if several else ""
        save_figure(grid_figure(dataset, entry), out / f"grid{end}.png")
        save_figure(curves_figure(dataset, entry), out / f"curves{end}.png")
    write_text(out / "robustness.html", robustness_page(content))
    write_json(out / "robustness.json", content)  # last: it marks the folder as complete
