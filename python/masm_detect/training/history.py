"""What a run records: one entry an epoch, the changes of the masks, and the file `history.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from masm_detect.config import RuntimeConfig
from masm_detect.data.frames import FrameDataset
from masm_detect.distributed import Processes
from masm_detect.errors import TrainingError
from masm_detect.evaluation.predict import predict
from masm_detect.methods.method import Method
from masm_detect.models.detector import Detector
from masm_detect.results import finite, write_text

from .state import Position
from .step import task_loss


def epoch_entry(
    detector: Detector,
    method: Method,
    val_set: FrameDataset,
    position: Position,
    *,
    drift: dict[str, float] | None,
    rate: float,
    runtime: RuntimeConfig,
    precision: str,
    ranks: Processes,
) -> tuple[dict[str, Any], Tensor]:
    """Validate `detector` on `val_set`; returns the entry of the epoch that `position` has just completed, and the
    logits [n] of validation.

    Args:
        drift: ||dW|| / ||W|| of each adapted layer; None if the method has no factored layers.
        rate: learning rate of the last step as a fraction of the peak.
        ranks: the processes that divide the validation; each returns the same.

    Raises:
        TrainingError: an output of the detector is not finite.
    """
    logits = predict(
        detector,
        val_set,
        batch_size=runtime.eval_batch_size,
        precision=precision,
        workers=runtime.workers,
        progress="validation" if runtime.progress else None,
        ranks=ranks,
    )
    if not torch.isfinite(logits).all():
        raise TrainingError(
            f"the detector's outputs are not finite after step {position.step}: lower the learning rates"
        )
    labels = torch.tensor([sample.label for sample in val_set.samples])
    train_loss, penalty = position.mean_losses()
    entry = {
        "epoch": position.epoch,
        "step": position.step,
        "images": position.seen,
        "seconds": round(position.seconds, 3),
        "waited": round(position.waited, 3),
        "rate": rate,
        "train_loss": train_loss,
        "penalty": penalty,
        "val_auc": float(roc_auc_score(labels.numpy(), logits.numpy())),
        "val_loss": float(task_loss(logits, labels, torch.ones(2))),
    }
    if drift is not None:
        entry["drift"] = drift
    if method.masks is not None:
        active = (method.masks.masks > 0).float()  # [L, K]
        entry["active_fraction"] = float(active.mean())
        entry["active_by_subspace"] = active.mean(0).tolist()
    if hasattr(method.optimizer, "skipped_steps"):
        entry["skipped_steps"] = int(method.optimizer.skipped_steps)
    return entry, logits


def mask_history(method: Method) -> list[dict[str, Any]]:
    """The masks over time as plain lists: dicts with `step`, `mask` [L][K], `snr` [L][K]. Empty without masks."""
    if method.masks is None:
        return []
    return [
        {key: value.tolist() if isinstance(value, (Tensor, np.ndarray)) else value for key, value in entry.items()}
        for entry in method.masks.history
    ]


def write_history(folder: Path, history: list[dict[str, Any]]) -> None:
    """Write `history.jsonl`, one epoch a line, atomically; a number that is not finite becomes null."""
    lines = [json.dumps(finite(entry), allow_nan=False) + "\n" for entry in history]
    write_text(folder / "history.jsonl", "".join(lines))
