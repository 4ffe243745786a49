"""Times the scoring of pictures by a trained run against the passes of its plain backbone alone.

    python benchmarks/speed/predict.py RUN PICTURES --as-is          # results/predict-cpu.json

RUN is a run folder, PICTURES a folder of pictures (with `--as-is` ready crops). In each round every contender handles
the same images once, in a random order, in one process. `backbone`: the pretrained backbone with a linear head, on
tensors that are in memory already: nothing that scores can beat it. `predict`: `masm_detect.load_detector(RUN).predict`
from files to scores, with reading, cutting, transform and calibration.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import statistics
from machine import describe
from masm_detect import load_detector
from masm_detect.casework.detector import ScoreOptions, find_files
from masm_detect.data.cutting import cut_file
from masm_detect.data.mtcnn import MtcnnDetector
from masm_detect.data.transforms import transform_image
from masm_detect.models.detector import new_detector
from masm_detect.results import write_json
from masm_detect.runtime import autocast, choose_attention, resolve_precision

from masm_ext.progress import Progress

RESULTS = Path(__file__).resolve().parent / "results"


def main() -> int:
    """The program; returns its exit code."""
    options = _parser().parse_args()
    trained = load_detector(options.run, "cpu")
    files = find_files(options.pictures)[: options.count]
    score = ScoreOptions(as_is=options.as_is, batch_size=options.batch)
    recipe = None if score.as_is else trained.needed_recipe()
    faces = MtcnnDetector() if recipe is not None and recipe.region == "face" else None
    crops = [crop for file in files for crop in cut_file(file, recipe, faces).crops]
    batches = torch.stack([transform_image(crop.rgb, trained.transform) for crop in crops]).split(options.batch)
    plain = new_detector(trained.config.model).eval()
    choose_attention(plain.backbone, torch.device("cpu"))
    precision = resolve_precision("auto", torch.device("cpu"))

    @torch.inference_mode()
    def backbone() -> None:
        for images in batches:
            with autocast(precision, images.device):
                plain(images)

    contenders: dict[str, Callable[[], Any]] = {"backbone": backbone}
    for workers in options.workers:
        one = ScoreOptions(as_is=options.as_is, batch_size=options.batch, workers=workers)
        contenders[f"predict, {workers} workers"] = lambda one=one: list(trained.score_files(files, one))
    for run in contenders.values():
        run()  # the first call reads files into the cache, and chooses kernels
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    with Progress(total=options.rounds * len(contenders), desc="timing", unit="run") as bar:
        for _ in range(options.rounds):
            for name in random.sample(list(contenders), len(contenders)):
                started = time.perf_counter()
                contenders[name]()
                samples[name].append((time.perf_counter() - started) / len(crops))
                bar.update()
    result = {
        "machine": describe(torch.device("cpu")),
        "run": {"method": trained.config.method.name, "backbone": trained.config.model.backbone,
                "image_size": trained.detector.backbone.image_size, "region": recipe.region if recipe else "as is"},
        "precision": precision,
        "files": len(files),
        "images": len(crops),
        "contenders": statistics(samples, "backbone"),
    }  # fmt: skip
    write_json(options.out, result)
    print(table(result))
    print(f"written: {options.out}")
    return 0


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for name, entry in result["contenders"].items():
        ratio = entry["ratio"]
        lines.append(
            f"{name:<20} {1 / entry['median']:8.1f} images/s; its throughput is {1 / ratio['median']:.2f} of the "
            f"backbone's ({1 / ratio['p80']:.2f} to {1 / ratio['p20']:.2f})"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="run folder written by masm train")
    parser.add_argument("pictures", type=Path, help="folder of pictures")
    parser.add_argument("--as-is", action="store_true", help="the pictures are ready crops")
    parser.add_argument("--count", type=int, default=512, help="most pictures")
    parser.add_argument("--batch", type=int, default=32, help="images in a batch")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="numbers of processes that read")
    parser.add_argument("--rounds", type=int, default=5, help="times that each contender runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "predict-cpu.json", help="the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
