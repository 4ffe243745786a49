"""What a training step of each variant of a study costs: time, memory and trained weights.

Variants are timed in turn, round after round, in fresh processes, so that a slow minute of the machine meets all of
them; a figure is a median over rounds, and the ratio to LoRA is one of the same round. Run it on a quiet machine.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from masm_detect.config import ConfigError
from masm_detect.methods.build import build_method
from masm_detect.methods.method import Calibration
from masm_detect.models.detector import Detector
from masm_detect.results import write_json
from masm_detect.training.calibration import calibration_loss
from masm_detect.training.step import train_step
from plan import SPECTRUM, Run, Study, make_run
from runner import fresh_backbone, made_by, one_thread

from masm_ext.progress import Progress

sys.path.append(str(Path(__file__).resolve().parents[1] / "speed"))  # last: some files have the same name in both
from peak_memory import peak_bytes, reset_peak, resident_bytes

WARM_UP, STEPS = 3, 10
BASELINE = "lora"
CPU = torch.device("cpu")


def measure(run: Run) -> dict[str, Any]:
    """Median seconds of a step; the memory in bytes that the steps added to the process at its peak, and by which
    counter; and the number of trained weights.
    """
    detector = Detector(fresh_backbone(run.backbone, run.image_size))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(run.optim.batch_size, 3, run.image_size, run.image_size, generator=generator)
    labels, weights = torch.arange(run.optim.batch_size) % 2, torch.ones(2)
    calibration = Calibration([(images, labels)] * 2, calibration_loss)
    method = build_method(run.method.name, detector, run.method, run.seed, calibration=calibration)
    counter = reset_peak(CPU)  # building a method may take more than its steps: SVDs, a calibration
    before, seconds = resident_bytes(CPU), []
    for _ in range(WARM_UP + STEPS):
        started = time.perf_counter()
        train_step(detector, method, images, labels, weights=weights, optim=run.optim, autocast_context=nullcontext())
        seconds.append(time.perf_counter() - started)
    return {
        "seconds": float(np.median(seconds[WARM_UP:])),
        "bytes": peak_bytes(CPU) - before,
        "counter": counter,
        "trained": method.trainable_parameters,
    }


def cost(study: Study, results: Path, rounds: int) -> int:
    """Measure every variant of the study's grid and final stage that has a network; prints a table and writes
    `cost.json`. The first setting of the grid is taken: learning rates do not change the cost.
    """
    if not study.grid:
        where = f"; measure {study.settings_from}, whose grid it takes" if study.settings_from else ""
        raise ConfigError(f"study {study.name} has no grid, from which the variants come{where}")
    direction, seed = study.grid["direction"], study.grid["seed"]
    settings = study.grid["settings"]
    planned = dict.fromkeys([*settings, *study.stages.get("final", {}).get("variants", ())])
    names = [name for name in planned if name != SPECTRUM]
    if BASELINE not in names:
        raise ConfigError(f"study {study.name} has no variant {BASELINE!r}, to which the others are compared")
    runs = {name: make_run(study, direction, name, seed, settings.get(name, [{}])[0]) for name in names}
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in runs}
    order = [(name, run) for _ in range(rounds) for name, run in runs.items()]
    for name, run in Progress(order, desc="cost", unit="process"):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=one_thread) as pool:
            measured[name].append(pool.submit(measure, run).result())
    table = {}
    for name, values in measured.items():
        ratios = [one["seconds"] / other["seconds"] for one, other in zip(values, measured[BASELINE])]
        table[name] = {
            "milliseconds": round(1000 * float(np.median([one["seconds"] for one in values])), 1),
            "time_ratio": round(float(np.median(ratios)), 3),
            "mebibytes": round(float(np.median([one["bytes"] for one in values])) / 2**20),
            "trained": values[0]["trained"],
        }
        row = table[name]
        print(
            f"{name}: {row['milliseconds']:.0f} ms a step ({row['time_ratio']:.2f} of {BASELINE}), "
            f"{row['mebibytes']} MiB, {row['trained']:,} trained weights"
        )
    counters = sorted({one["counter"] for values in measured.values() for one in values})
    made = made_by() | {"rounds": rounds, "threads": 1, "memory": counters}
    write_json(results / study.name / "cost.json", {"variants": table, "provenance": made})
    return 0
