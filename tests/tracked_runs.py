"""Runs that are tracked, and what their trackers should have received."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import tiny

#: Of `tiny.run_config`.
EPOCHS, STEPS = 3, 5


def tracked(data, backbone, out: Path, *names: str, every: int = 2, method: str = "masm", resume: bool = False):
    config = tiny.run_config(data, backbone, out, method, resume=resume)
    return replace(config, runtime=replace(config.runtime, trackers=list(names), track_every=every))


def history(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]


def expected(entry: dict) -> dict[str, float]:
    """The scalars of an epoch, computed from its entry here."""
    drift = np.array(list(entry["drift"].values()))
    shares = {f"masks/active/subspace-{k}": share for k, share in enumerate(entry["active_by_subspace"])}
    return {
        "train/loss": entry["train_loss"], "train/penalty": entry["penalty"],
        "val/auc": entry["val_auc"], "val/loss": entry["val_loss"],
        "masks/active": entry["active_fraction"], **shares,
        "drift/mean": drift.mean(), "drift/largest": drift.max(),
        "train/images_per_second": entry["images"] / entry["seconds"],
    }  # fmt: skip


def scalars_of(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) of the event files in a folder, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
