"""Trains every method of a study, in every direction and with every seed, and writes the numbers.

    python benchmarks/generalization/run.py --study gan-faces --data DATA --work WORK

One result is one training run: study / direction / method / seed. Each is written to `results/<study>.json` as soon
as it is there, so an interrupted run continues where it stopped; a file made with other settings is refused.
Runs are executed in parallel, one thread each: on a small model that is about 1.4 times as fast as one run with all
threads. Only numbers are written outside the work folder.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import torch
from masm_detect.config import MethodConfig, RuntimeConfig
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import Sample
from masm_detect.evaluation.metrics import evaluate_scores
from masm_detect.evaluation.predict import score_samples
from masm_detect.methods.build import build_method, resolve
from masm_detect.methods.registry import METHODS
from masm_detect.models.backbone import load_backbone
from masm_detect.models.detector import Detector
from masm_detect.provenance import provenance
from masm_detect.results import read_json, write_json
from masm_detect.runtime import resolve_precision
from masm_detect.training.loop import fit
from spectrum import spectrum_scores
from studies import STUDIES, Study, StudyDataMissing

from masm_ext.progress import Progress

BACKBONE = "bundled:dinov2-small"
#: The baseline without a network.
SPECTRUM = "spectrum"
#: Settings of single methods that differ from the rates of `masm_detect.methods`; chosen on source validation.
SETTINGS: dict[str, dict] = {}


def main() -> int:
    """Run what is missing of a study; returns the exit code."""
    options = _parser().parse_args()
    study = STUDIES[options.study]
    try:
        samples = study.prepare(options.data, options.work)
    except StudyDataMissing as error:
        print(f"skipped: study {study.name}: {error}")
        return 0
    out = options.out / f"{study.name}.json"
    settings = json.loads(json.dumps(_settings(study, options.limit)))
    new = {"study": study.name, "settings": settings, "launches": [], "runs": {}}
    results = read_json(out) if out.is_file() else new
    if results["settings"] != settings:
        print(f"{out} was made with other settings; move it away, or give another --out", file=sys.stderr)
        return 2
    results["launches"].append(provenance() | {"threads": 1, "workers": options.workers})
    tasks = [
        (study.name, samples, direction, method, seed, str(options.work), options.limit)
        for seed in options.seeds
        for direction in options.directions or study.directions
        for method in options.methods
        if _key(direction, method, seed) not in results["runs"]
    ]
    failed: list[str] = []
    # Forking a process whose torch already has threads may hang: start clean ones.
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=_one_thread) as pool:
        futures = {pool.submit(_run, *task): _key(*task[2:5]) for task in tasks}
        for future in Progress(as_completed(futures), total=len(futures), desc=study.name, unit="run"):
            if future.exception() is not None:
                failed.append(futures[future])
                Progress.write(f"FAILED {futures[future]}: {future.exception()!r}")
                continue
            key, result = future.result()
            results["runs"][key] = result | {"launch": len(results["launches"]) - 1}
            write_json(out, results)
            Progress.write(f"{key}: {_summary(study, key, result)}")
    if failed:
        print(f"{len(failed)} of {len(tasks)} runs failed and are not in {out}: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _run(
    study_name: str, samples: list[Sample], direction: str, method: str, seed: int, work: str, limit: int | None
) -> tuple[str, dict]:
    """One training run and its test: (key, result). `limit`: train on so many samples only (to try the program
    out).
    """
    study = STUDIES[study_name]
    split = study.split(samples, study.directions[direction], seed)
    train = split.train[:: max(1, len(split.train) // limit)] if limit else split.train
    started = time.perf_counter()
    if method == SPECTRUM:
        scores, extra = spectrum_scores(train, split.test), {}
    else:
        scores, extra = _train_and_score(study, replace(split, train=train), method, seed)
    key = _key(direction, method, seed)
    # Scores stay in the work folder: the report draws its pooled intervals from them.
    names = {"group": [s.group for s in split.test], "method": [s.method for s in split.test]}
    rows = {"video": [s.video for s in split.test], "label": [s.label for s in split.test], "score": scores.tolist()}
    file = Path(work) / "scores" / study_name / f"{key.replace('/', '-')}.json"
    write_json(file, {**names, **rows})
    return key, {
        "direction": direction,
        "method": method,
        "seed": seed,
        "samples": {"train": len(train), "val": len(split.val), "test": len(split.test)},
        "seconds": round(time.perf_counter() - started, 1),
        **extra,
        "test": evaluate_scores(split.test, scores)["datasets"],
    }


def _train_and_score(study: Study, split, method_name: str, seed: int):
    detector = Detector(load_backbone(BACKBONE, image_size=study.image_size))
    runtime = RuntimeConfig(seed=seed, progress=False, checkpoint_every=0)
    method = build_method(method_name, detector, _method_config(method_name), seed)
    result = fit(
        detector,
        method,
        frame_dataset(split.train, detector.backbone, study.data, augment=True, seed=seed),
        frame_dataset(split.val, detector.backbone, study.data),
        optim=study.optim,
        runtime=runtime,
    )
    precision = resolve_precision(runtime.precision, torch.device("cpu"))
    scores = score_samples(detector, frame_dataset(split.test, detector.backbone, study.data), precision=precision)
    keep = ("epoch", "train_loss", "penalty", "val_auc", "val_loss", "active_fraction")
    history = [{name: entry[name] for name in keep if name in entry} for entry in result.history]
    extra = {
        "trainable_parameters": method.trainable_parameters,
        "chosen_epoch": result.best_epoch,
        "val_auc": result.best_val_auc,
        "precision": precision,
        "images_per_second": round(result.images_per_second, 2),
        "skipped_steps": result.skipped_steps,
        "history": history,
    }
    if "drift" in result.history[-1]:
        drift = list(result.history[-1]["drift"].values())
        extra["drift"] = {"mean": sum(drift) / len(drift), "max": max(drift)}
    return scores, extra


def _method_config(name: str) -> MethodConfig:
    return resolve(MethodConfig(name=name, **SETTINGS.get(name, {})))


def _settings(study: Study, limit: int | None) -> dict:
    data = asdict(study.data)
    return {
        "limit": limit,
        "backbone": BACKBONE,
        "image_size": study.image_size,
        "data": {name: data[name] for name in ("crop", "augment")},
        "optim": asdict(study.optim),
        "methods": {name: asdict(_method_config(name)) for name in METHODS},
        "directions": {name: {"seen": seen, "unseen": study.unseen(name)} for name, seen in study.directions.items()},
    }


def _key(direction: str, method: str, seed: int) -> str:
    return f"{direction}/{method}/seed{seed}"


def _summary(study: Study, key: str, result: dict) -> str:
    (entry,) = result["test"].values()
    unseen = study.unseen(result["direction"])
    numbers = [
        f"{name}{' (unseen)' if name in unseen else ''} {m[study.headline]:.3f}" for name, m in entry["methods"].items()
    ]
    val = f"val {result['val_auc']:.3f}, " if "val_auc" in result else ""
    return f"{val}{', '.join(numbers)} in {result['seconds']:.0f} s"


def _one_thread() -> None:
    # Imported now, not when first used: sources edited during a long run must not change what it runs.
    import peft  # noqa: F401

    import masm_ext  # noqa: F401

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--study", choices=list(STUDIES), required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with ffpp-c40-videos/ and gan-faces/")
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for crops, tiles and scores (images stay there)"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of <study>.json")
    parser.add_argument("--methods", nargs="+", choices=[SPECTRUM, *METHODS], default=[SPECTRUM, *METHODS])
    parser.add_argument("--directions", nargs="+", help="default: all of the study")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--limit", type=int, help="for a quick trial: train on about this many samples only")
    return parser


if __name__ == "__main__":
    sys.exit(main())
