"""A small tree in DeepfakeBench's format: images of noise, fakes with stripes, JSON files as its scripts write them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

FF_METHODS = ("FF-DF", "FF-F2F", "FF-FS", "FF-NT")


def write_ffpp(root: Path, seed: int, pairs: int = 8, splits=("train", "val", "test"), levels=("c23",)) -> Path:
    """FaceForensics++.json: `pairs` originals a split, a fake of each method of each, 2 frames a video."""
    random = np.random.default_rng(seed)
    tree: dict = {label: {split: {} for split in splits} for label in ("FF-real", *FF_METHODS)}
    for level in levels:
        for number, split in enumerate(splits):
            for index in range(pairs):
                name = f"{number * 100 + index:03d}"
                for label in tree:
                    video = name if label == "FF-real" else f"{name}_{number * 100 + (index ^ 1):03d}"
                    record = _video(root, random, f"ff/{label}/{level}/frames/{video}", label, label != "FF-real")
                    tree[label][split].setdefault(level, {})[video] = record
    return _write(root, "FaceForensics++", tree)


def write_test_set(root: Path, seed: int, name: str, labels: Sequence[str], videos: int = 4, splits=("test",)) -> Path:
    """NAME.json with `videos` videos of 2 frames for each label; those of the first label are real."""
    random = np.random.default_rng([seed, *name.encode()])
    tree: dict = {label: {split: {} for split in ("train", "val", "test")} for label in labels}
    for place, label in enumerate(labels):
        for split in splits:
            for index in range(videos):
                video = f"id{place}_{split}_{index:04d}"
                tree[label][split][video] = _video(root, random, f"{name}/{label}/{video}", label, place > 0)
    return _write(root, name, tree)


def _video(root: Path, random: np.random.Generator, folder: str, label: str, fake: bool, frames: int = 2) -> dict:
    (root / folder).mkdir(parents=True)
    paths = [f"{folder}/{frame:03d}.png" for frame in range(frames)]
    for path in paths:
        image = random.integers(60, 200, (28, 28, 3), dtype=np.uint8)
        if fake:
            image[:, ::4] = 255
        assert cv2.imwrite(str(root / path), image)
    return {"label": label, "frames": paths}


def _write(root: Path, name: str, tree: dict) -> Path:
    path = root / f"{name}.json"
    path.write_text(json.dumps({name: tree}))
    return path
