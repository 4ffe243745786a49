"""Scores trained runs on data sets, or reads their scores: tables, score files, one JSON, one page, one plot."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from masm_detect.config import ConfigError, EvalConfig
from masm_detect.config_files import load_config, to_dict
from masm_detect.data.checks import check_samples
from masm_detect.data.content_cache import Content
from masm_detect.data.contents import read_contents
from masm_detect.data.copies import check_contents
from masm_detect.data.crop_recipe import check_same_crops, read_recipe
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import DatasetError, Sample, limit_frames
from masm_detect.data.samples import Samples
from masm_detect.data.seen import seen_in_training
from masm_detect.data.sources import load_samples
from masm_detect.distributed import Processes, processes
from masm_detect.provenance import provenance
from masm_detect.report.evaluation_page import evaluation_page
from masm_detect.report.plots import plot_auc
from masm_detect.results import check_output_folder, prepare_outputs, write_json, write_text
from masm_detect.runtime import process_settings, resolve_precision

from .calibration import load_calibration
from .metrics import CallsFake, evaluate_scores
from .predict import predict
from .protocol_data import ProtocolData, protocol_results, read_protocol_data, require_training, training_differences
from .protocols import Protocol, load_protocol
from .runs import load_run
from .score_file import ScoreRow, labelled, name_of, read_scores, scored_samples, write_scores, write_videos
from .test_sets import record_evaluation


@dataclass(frozen=True)
class Scored:
    """The scores of one detector.

    Attributes:
        samples: the n samples
        scores: P(fake) of each, [n]
        rows: the same as rows of a score file
        about: what results.json contains beside the metrics
        calls_fake: the decision at its calibrated threshold; None: it has none
    """

    samples: Sequence[Sample]
    scores: np.ndarray
    rows: Sequence[ScoreRow]
    about: dict[str, Any]
    calls_fake: CallsFake | None = None


#: Settings that have a meaning for runs only.
_OF_DATA = ("paths", "split", "frames_per_video")


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Score every run of `config` on its data sets, read its score files, and write the results to `config.out`.

    Written are results.json, report.html and auc.png, and for each run or score file the folder of its name with
    scores.csv (`score_file`) and videos.csv. torch's settings of the process (`runtime.process_settings`) are restored
    at the end.

    Args:
        config: runs and data sets, score files, output folder.

    Returns:
        The content of results.json: {"provenance", "config", "protocol": `protocol_data.protocol_results`, or None
        without a protocol, "runs": {run name: {"method", "seen_in_training", "test_sets",
        **`metrics.evaluate_scores`}}}; "seen_in_training" is that of `data.seen.seen_in_training`, "test_sets" that of
        `test_sets.record_evaluation`. These and "method" are None for a score file.

    Raises:
        ConfigError: neither a run nor a score file, a folder that is no finished run, no data, or `config.out` holds
            results and `config.overwrite` is not set.
        RecipeError: the images were cut differently from the training images of a run, and `config.as_is` is not set.
        DatasetError: a data set that holds one class only, or a file that is in two splits or real and fake, byte for
            byte.
        ProtocolError: a protocol that is not known, none of its test sets below `config.data_root`, or a run that was
            not trained as it requires, and `config.other_training` is not set.
        ScoreFileError: a score file that cannot be read, or has no labels.
        UnreadableImage: a file is absent or damaged.
    """
    if config.scores and not config.runs and (ignored := [n for n in _OF_DATA if getattr(config, n)]):
        raise ConfigError(
            f"{', '.join(ignored)} select images for a run, and cannot select lines of the score files: name a run, or "
            "leave them out"
        )
    if not config.runs and not config.scores:
        raise ConfigError(
            "runs is empty: name at least one run folder written by `masm train`, or score files with --scores"
        )
    check_output_folder(config.out)
    out = Path(config.out)
    if (out / "results.json").exists() and not config.overwrite:
        raise ConfigError(f"{config.out} already holds results: give another --out, or --overwrite to replace them")
    folders: dict[str, Any] = {}
    for name in (*(Path(run).resolve().name for run in config.runs), *(name_of(Path(p)) for p in config.scores)):
        folders[_unique(name, folders)] = None
    files = [out / name / file for name in folders for file in ("scores.csv", "videos.csv")]
    files += [out / name for name in ("auc.png", "report.html", "results.json")]
    prepare_outputs(files, config.scores, overwrite=config.overwrite)
    scored: dict[str, Scored] = {}
    protocol = None if config.protocol is None else _Protocol.of(config)
    with process_settings(config.runtime) as device, processes(device) as ranks:
        if config.runs:
            _score_runs(config, device, scored, protocol, ranks)
        for path in config.scores:
            _read_score_file(Path(path), scored)
        results = {
            name: {**one.about, **evaluate_scores(one.samples, one.scores, config.video_key, one.calls_fake)}
            for name, one in scored.items()
        }
        names = {"runs": [Path(run).name for run in config.runs], "scores": [Path(p).name for p in config.scores]}
        content = {
            "provenance": provenance(str(device)),
            "config": to_dict(replace(config, **names)),
            "protocol": None if protocol is None else protocol.results(scored, config),
            "runs": results,
        }
    if not ranks.is_first:
        return content
    for name, one in scored.items():
        write_scores(out / name / "scores.csv", one.rows)
        write_videos(out / name / "videos.csv", one.samples, one.scores)
    plot_auc(results, out / "auc.png")
    write_text(
        out / "report.html", evaluation_page(content, {n: (one.samples, one.scores) for n, one in scored.items()})
    )
    write_json(out / "results.json", content)  # last: it marks the folder as complete
    return content


@dataclass(frozen=True)
class _Protocol:
    """A protocol, its data, and how the training of each run differs from it, in the order of the runs."""

    protocol: Protocol
    data: ProtocolData
    differences: Sequence[Sequence[str]]

    @classmethod
    def of(cls, config: EvalConfig) -> _Protocol:
        """Load the protocol, compare the runs with it, and read its data."""
        protocol = load_protocol(config.protocol, config.parameters or {})
        configs = [load_config(Path(folder) / "config.yaml") for folder in config.runs]
        differences = [training_differences(protocol, *pair) for pair in zip(config.runs, configs)]
        if not config.other_training:
            require_training(protocol, dict(zip(config.runs, differences)))
        return cls(protocol, read_protocol_data(protocol, config), differences)

    def results(self, scored: Mapping[str, Scored], config: EvalConfig) -> dict[str, Any]:
        """What results.json contains of the protocol."""
        scores = {name: one.scores for name, one in scored.items()}
        return protocol_results(self.protocol, self.data, scores, dict(zip(scored, self.differences)), config.video_key)


def _score_runs(
    config: EvalConfig, device: torch.device, scored: dict[str, Scored], protocol: _Protocol | None, ranks: Processes
) -> None:
    samples = Samples(samples_of(config)) if protocol is None else protocol.data.samples
    sources = [slice(0, len(samples))] if protocol is None else protocol.data.sources
    paths = config.paths if protocol is None else protocol.data.paths
    contents: list[Content] = []
    evaluation = uuid.uuid4().hex
    for folder in config.runs:
        if not config.as_is:
            check_same_crops(read_recipe(folder), paths, Path(folder).name)
        run, detector = load_run(folder, device)
        if not contents:
            if not ranks.is_first:
                ranks.wait()  # then the cache holds what the first process has read
            contents = read_contents(samples, config.runtime.progress and ranks.is_first)
            if ranks.is_first:
                ranks.wait()
            for source in sources:
                check_contents(samples[source], contents[source])
        logits = predict(
            detector,
            frame_dataset(samples, detector.backbone, run.data),
            batch_size=config.runtime.eval_batch_size,
            precision=resolve_precision(config.runtime.precision, device),
            workers=config.runtime.workers,
            progress=Path(folder).name if config.runtime.progress and ranks.is_first else None,
            ranks=ranks,
        )
        rows = scored_samples(samples, logits.double().numpy())
        opened = None
        if ranks.is_first:
            opened = record_evaluation(
                folder,
                samples,
                contents,
                out=config.out,
                evaluation=evaluation,
                protocol=None if protocol is None else protocol.protocol.name,
            )
        scored[_unique(Path(folder).resolve().name, scored)] = Scored(
            samples,
            np.array([row.p_fake for row in rows]),
            rows,
            {
                "method": run.method.name,
                "seen_in_training": seen_in_training(Path(folder), samples, contents),
                "test_sets": opened,
            },
            _calls_fake(Path(folder)),
        )


def _read_score_file(path: Path, scored: dict[str, Scored]) -> None:
    rows, name = read_scores(path), name_of(path)
    samples, scores = labelled(rows, str(path), dataset=name)
    scored[_unique(name, scored)] = Scored(
        samples, scores, rows, dict.fromkeys(("method", "seen_in_training", "test_sets"))
    )


def _calls_fake(folder: Path) -> CallsFake | None:
    """The decision at the calibrated threshold of a run; None if it has none."""
    calibration = load_calibration(folder)
    if calibration is None or calibration.thresholds["fake"] is None:
        return None
    return calibration.calls_fake


def samples_of(config: EvalConfig) -> list[Sample]:
    """The samples of the data sets of `config`, each with both classes; errors as of `evaluate`."""
    samples = load_samples(
        config.paths,
        splits=None if config.split is None else [config.split],
        root=config.root,
        prefix_map=config.prefix_map,
        compression=config.compression,
        label_map=config.label_map,
        video_pattern=config.video_pattern,
        missing=config.missing,
        hf=config.hf,
    )
    samples = limit_frames(samples, config.frames_per_video)
    check_samples(samples)
    for dataset in sorted({sample.dataset for sample in samples}):
        labels = {sample.label for sample in samples if sample.dataset == dataset}
        if len(labels) == 1:
            raise DatasetError(
                f"all samples of the data set {dataset!r} are {'fake' if 1 in labels else 'real'}: an AUC needs both "
                "classes in each data set; leave it out, or put it into one folder or file with the other class"
            )
    return samples


def _unique(name: str, taken: dict[str, Any]) -> str:
    candidate, number = name, 2
    while candidate in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
