"""One training run of a study: draw its images, train, test, and return the numbers."""

from __future__ import annotations

import copy
import hashlib
import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from differences import against_real
from masm_detect.config import ConfigError, RuntimeConfig
from masm_detect.data.frames import FrameDataset, frame_dataset
from masm_detect.data.sample import Sample, limit_frames
from masm_detect.data.self_blended import self_blended
from masm_detect.evaluation.predict import score_samples
from masm_detect.methods.build import build_method
from masm_detect.methods.registry import METHODS
from masm_detect.methods.registry import load as load_method
from masm_detect.models.backbone import Backbone, load_backbone
from masm_detect.models.detector import Detector
from masm_detect.provenance import git_state, provenance
from masm_detect.training.calibration import calibration_on
from masm_detect.training.loop import fit
from plan import Run, data_config
from sklearn.metrics import roc_auc_score
from spectrum import spectrum_scores
from study_data import Images, load


@dataclass(frozen=True)
class Drawn:
    """The samples of a run."""

    train: list[Sample]
    val: list[Sample]
    test: list[Sample]

    def learned_sha256(self, data: Images) -> str:
        """A hash of names, labels and pixels of training and validation: those of one direction and seed are alike."""
        found = hashlib.sha256()
        for sample in (*self.train, *self.val):
            found.update(f"{sample.path} {sample.label}\n".encode())
            found.update(data.images[sample.path].tobytes())
        return found.hexdigest()


def draw(data: Images, run: Run) -> Drawn:
    """Training and validation images from the pool, by the seed; the test is the same for every seed and variant.

    Real images and those of a forgery are drawn apart, but where they are versions of one photograph (their groups are
    the same), no group is in training and validation both.
    """
    sampling, seen = run.sampling, run.seen
    rng = np.random.default_rng(run.seed)
    pool: dict[str, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))  # method -> group -> tiles
    for sample in data.samples:
        if sample.split == "pool" and (sample.method == "real" or sample.method in seen):
            pool[sample.method][sample.group].append(sample)
    tested = {sample.method for sample in data.samples if sample.split == "test"}
    for names, found, where in (
        (("real", *seen), pool, "to train on"),
        (("real", *seen, *run.unseen), tested, "to test"),
    ):
        if absent := [name for name in names if name not in found]:
            raise ConfigError(f"{run.key}: the data set {run.dataset} has no images of {', '.join(absent)} {where}")
    parts: dict[str, list[Sample]] = {"train": [], "val": []}
    order: dict[tuple[str, ...], list[str]] = {}
    for method in ("real", *seen):
        groups = tuple(sorted(pool[method]))
        if groups not in order:
            order[groups] = rng.permutation(groups).tolist()
        rank = 0 if method == "real" else list(seen).index(method)
        share = 1 if method == "real" else len(seen)
        for part, names in (
            ("val", order[groups][: sampling.val]),
            ("train", order[groups][sampling.val : sampling.val + sampling.train]),
        ):
            for number, group in enumerate(names):
                if number % share != rank % share:
                    continue  # the forgeries take turns, so that there are as many fakes as reals
                tiles = sorted(pool[method][group], key=lambda sample: sample.path)
                if len(tiles) > sampling.train_tiles:
                    # the same tiles of a photograph in all its versions
                    own = np.random.default_rng([run.seed, *group.split("/")[-1].encode()])
                    tiles = [tiles[i] for i in sorted(own.permutation(len(tiles))[: sampling.train_tiles])]
                parts[part] += [replace(tile, split=part) for tile in tiles]
    sides = [{sample.group for sample in parts[part]} for part in ("train", "val")]
    if sides[0] & sides[1]:
        raise ConfigError(f"{run.key}: {len(sides[0] & sides[1])} groups are in training and validation both")
    if sampling.shuffled:
        labels = rng.permutation([sample.label for sample in parts["train"]])
        parts["train"] = [replace(sample, label=int(label)) for sample, label in zip(parts["train"], labels)]
    if sampling.self_blended:
        parts = {part: self_blended(samples) for part, samples in parts.items()}
    methods = {"real", *run.seen, *run.unseen}
    test = [sample for sample in data.samples if sample.split == "test" and sample.method in methods]
    return Drawn(parts["train"], parts["val"], limit_frames(test, sampling.test_tiles))


@dataclass(frozen=True)
class Units:
    """What is scored: the test images of a direction. `scores` of tiles become scores of images by their mean."""

    videos: list[str]
    datasets: list[str]
    methods: list[str]
    groups: list[int]

    @classmethod
    def of(cls, test: Sequence[Sample]) -> Units:
        """The units of test samples, in the order of their names."""
        first = {sample.video: sample for sample in test}
        videos = sorted(first)
        numbers = {group: number for number, group in enumerate(sorted({s.group for s in test}))}
        columns = [(first[v].dataset, first[v].method, numbers[first[v].group]) for v in videos]
        return cls(videos, *map(list, zip(*columns)))

    def scores(self, test: Sequence[Sample], scores: np.ndarray) -> list[float]:
        """Mean score of each unit, five digits."""
        sums: dict[str, list[float]] = defaultdict(list)
        for sample, score in zip(test, scores):
            sums[sample.video].append(float(score))
        return [round(float(np.mean(sums[video])), 5) for video in self.videos]

    def record(self, data: Images, test: Sequence[Sample]) -> dict[str, Any]:
        """What is known of the units, and hashes of their names and pixels, which themselves stay with the data."""
        names = hashlib.sha256("\n".join(self.videos).encode()).hexdigest()
        pixels = hashlib.sha256()
        for sample in test:
            pixels.update(data.images[sample.path].tobytes())
        return {
            "names_sha256": names,
            "pixels_sha256": pixels.hexdigest(),
            "datasets": self.datasets,
            "methods": self.methods,
            "groups": self.groups,
        }


def execute(run: Run, folder: Path, test: bool = True) -> tuple[dict[str, Any], dict[str, Any]]:
    """Train and test one run on the data sets in `folder`; returns its result and the record of its units.

    test: False to train and validate only, as a grid needs it: the test set stays closed while settings are chosen.
    """
    data = load(run.dataset, folder)
    drawn = draw(data, run)
    units = Units.of(drawn.test)
    started = time.perf_counter()
    if run.method is None:
        scores, numbers = spectrum_scores(drawn.train, drawn.test, data.images), {}
    else:
        scores, numbers = _train_and_score(run, drawn, data, test)
    outcome: dict[str, Any] = {}
    if test:
        values = units.scores(drawn.test, scores)
        outcome = {"auc": auc_by_method(units, values), "scores": values}
    result = {
        "study": run.study,
        "direction": run.direction,
        "variant": run.variant,
        "seed": run.seed,
        "settings": run.settings(),
        "samples": {"train": len(drawn.train), "val": len(drawn.val), "test": len(units.videos)},
        "learned_sha256": drawn.learned_sha256(data),
        "seconds": round(time.perf_counter() - started, 1),
        **numbers,
        **outcome,
    }
    return result, units.record(data, drawn.test)


def auc_by_method(units: Units, scores: Sequence[float]) -> dict[str, float]:
    """AUC of the units of each forgery against the real ones of its data set."""
    out = {}
    for method in sorted(set(units.methods) - {"real"}):
        keep = against_real(units.datasets, units.methods, method)
        out[method] = float(roc_auc_score(np.array(units.methods)[keep] == method, np.asarray(scores)[keep]))
    return out


def _train_and_score(run: Run, drawn: Drawn, data: Images, test: bool) -> tuple[np.ndarray, dict[str, Any]]:
    detector = Detector(fresh_backbone(run.backbone, run.image_size))
    # Named, not "auto": the outcome must not depend on what a CPU is fast at.
    runtime = RuntimeConfig(seed=run.seed, progress=False, checkpoint_every=0, device="cpu", precision=run.precision)
    config = data_config(run)

    def make(samples: Sequence[Sample], **options: Any) -> FrameDataset:
        return frame_dataset(samples, detector.backbone, config, images=data.images, **options)

    train_set = make(drawn.train, augment=True, seed=run.seed)
    calibration = calibration_on(train_set, run.optim, run.seed, torch.device("cpu"), workers=0)
    method = build_method(run.method.name, detector, run.method, run.seed, calibration=calibration)
    result = fit(detector, method, train_set, make(drawn.val), optim=run.optim, runtime=runtime)
    scores = score_samples(detector, make(drawn.test), precision=run.precision) if test else np.empty(0)
    keep = ("epoch", "train_loss", "penalty", "val_auc", "val_loss", "active_fraction")
    numbers: dict[str, Any] = {
        "trainable_parameters": method.trainable_parameters,
        "chosen_epoch": result.best_epoch,
        "val_auc": result.best_val_auc,
        "images_per_second": round(result.images_per_second, 2),
        "history": [{name: entry[name] for name in keep if name in entry} for entry in result.history],
    }
    if "drift" in result.history[-1]:
        drift = list(result.history[-1]["drift"].values())
        numbers["drift"] = {"mean": sum(drift) / len(drift), "max": max(drift)}
    return scores, numbers


def made_by() -> dict[str, Any]:
    """Where and by which code a result is made: versions, device, and the commit of all that runs."""
    folder = Path(__file__).resolve().parent
    sources = (".", ":(exclude)results", "../../masm_ext", "../../python", "../../csrc")
    return provenance() | {"git": git_state(folder, *sources)}


@lru_cache(maxsize=1)
def _pretrained(name: str, image_size: int) -> Backbone:
    return load_backbone(name, image_size=image_size)


def fresh_backbone(name: str, image_size: int) -> Backbone:
    """A copy of a backbone: methods change it in place."""
    return copy.deepcopy(_pretrained(name, image_size))


def one_thread() -> None:
    """Settings of a process that executes runs: one thread each, deterministic kernels."""
    # Imported now, not when first used: sources edited during a long run must not change what it runs.
    import peft  # noqa: F401

    for name in METHODS:
        load_method(name)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent has ended: nobody would read the result of its run."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
