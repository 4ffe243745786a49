"""Score files of simulated detectors, as several programs might write them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np


def write_runs(folder: Path, seed: int, gains: dict[str, float], videos: int = 30, frames: int = 2, sets=("one",)):
    """`folder`/<name>.csv for each name, with fakes `gain` above reals; all detectors share most of their errors."""
    rng = np.random.default_rng(seed)
    rows, common = [], []
    for dataset in sets:
        for method in ("real", "swap"):
            for video in range(videos):
                offset = rng.normal()
                for frame in range(frames):
                    rows.append((f"{dataset}/{method}/{video:03d}/{frame}.png", dataset, method, f"{video:03d}"))
                    common.append(offset + 0.5 * rng.normal())
    fake = np.array([row[2] != "real" for row in rows])
    for name, gain in gains.items():
        logits = np.array(common) + 0.4 * rng.normal(size=len(rows)) + gain * fake
        write_csv(
            folder / f"{name}.csv",
            ("path", "label", "score", "dataset", "method", "video", "group"),
            [
                (path, int(method != "real"), p, dataset, method, video, f"{dataset}/{video}")
                for (path, dataset, method, video), p in zip(rows, 1 / (1 + np.exp(-logits)))
            ],
        )
    return [str(folder / f"{name}.csv") for name in gains]


def write_csv(path: Path, columns, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))
