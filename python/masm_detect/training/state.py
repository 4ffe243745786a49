"""The state of a run between two steps: written to a checkpoint, and restored bit for bit."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from masm_detect.data.decode import UnreadableImage, byte_size
from masm_detect.data.frames import FrameDataset
from masm_detect.errors import CheckpointError, TrainingError
from masm_detect.methods.method import Method
from masm_detect.methods.trainable import frozen_sha256, load_trainable_state, trainable_state
from masm_detect.models.detector import Detector

from . import checkpoint
from .scaling import LossScale
from .step_losses import StepLoss


@dataclass
class Position:
    """Progress of a run: the next batch, and the sums of this epoch so far.

    Attributes:
        step: number of the next step, over all epochs
        seen: images trained on in this epoch
        counted: images whose losses are in the sums
        seconds: wall time from the request of the first batch to the end of the last step, with the checkpoints in
            between
        waited: seconds in which the host was blocked until a batch arrived
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seen: int = 0
    counted: int = 0
    task_sum: float = 0.0
    penalty_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, losses: Iterable[StepLoss], method: Method) -> None:
        """Add losses that have reached the host.

        Raises TrainingError for a loss that is not finite, except with the optimizer of `masm_ext`, which skips such a
        step: then the loss is left out of the sums.
        """
        for loss in losses:
            if not math.isfinite(loss.task) and not method.uses_masm_ext:
                raise TrainingError(f"the loss became {loss.task} at step {loss.step}: lower the learning rate")
            self.seen += loss.images
            if math.isfinite(loss.task) and math.isfinite(loss.penalty):
                self.counted += loss.images
                self.task_sum += loss.task * loss.images
                self.penalty_sum += loss.penalty * loss.images

    def mean_losses(self) -> tuple[float, float]:
        """Mean (task loss, penalty) per image; NaN before the first image."""
        return tuple(total / self.counted if self.counted else math.nan for total in (self.task_sum, self.penalty_sum))


@dataclass
class Chosen:
    """The epoch whose weights the run keeps, with its weights and its validation logits [n].

    The best one so far by source-validation AUC (ties: lower validation loss), or the last one.
    """

    epoch: int = -1
    val_auc: float = -1.0
    val_loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)
    val_logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def is_worse_than(self, val_auc: float, val_loss: float) -> bool:
        """Whether an epoch with these validation numbers is better."""
        return (val_auc, -val_loss) > (self.val_auc, -self.val_loss)


def save_state(
    folder: Path,
    detector: Detector,
    method: Method,
    conditions: dict[str, Any],
    position: Position,
    chosen: Chosen,
    history: list[dict[str, Any]],
    loss_scale: LossScale,
) -> None:
    """Write the checkpoint in place of the previous one.

    Raises TrainingError, and writes nothing, if a weight is not finite: a gradient can overflow in a step whose loss is
    finite.
    """
    device = next(detector.parameters()).device
    weights = trainable_state(detector)
    if not all(weight.isfinite().all() for weight in weights.values()):
        raise TrainingError(f"the weights are not finite after step {position.step}: lower the learning rates")
    checkpoint.save(
        folder / "last",
        {
            "method": method.name,
            "conditions": conditions,
            "position": asdict(position),
            "weights": weights,
            "optimizer": method.optimizer.state_dict(),
            "loss_scale": loss_scale.state_dict(),
            "chosen": asdict(chosen),
            "history": history,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        },
    )


def load_state(
    folder: Path | None,
    detector: Detector,
    method: Method,
    conditions: dict[str, Any],
    loss_scale: LossScale,
) -> tuple[Position, Chosen, list[dict[str, Any]]]:
    """Restore weights, optimizer, scale of the loss and random generators from the checkpoint in `folder`.

    Raises:
        CheckpointError: damaged, of another method, or a condition of the run has changed.
    """
    if folder is None:
        raise TrainingError("resume needs the folder of the run")
    state = checkpoint.load(folder / "last")
    if state["method"] != method.name:
        raise CheckpointError(f"{folder} was trained by {state['method']!r}, not by {method.name!r}")
    for name, now in conditions.items():
        before = state["conditions"][name]
        if before != now:
            reason = _CHANGED[name].format(before=before, now=now)
            raise CheckpointError(f"{folder} cannot be resumed: {reason}")
    load_trainable_state(detector, state["weights"])
    method.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    if "loss_scale" in state:  # not in checkpoints of bf16 and fp32 from before fp16 existed
        loss_scale.load_state_dict(state["loss_scale"])
    masks = getattr(method.optimizer, "masks", None)
    if masks is not None:
        masks.accept_layers()  # weights and optimizer come from one checkpoint
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], next(detector.parameters()).device)
    return Position(**state["position"]), Chosen(**state["chosen"]), state["history"]


# Conditions under which a resumed run equals an uninterrupted one, with the reason to report if one has changed.
_CHANGED = {
    "data_sha256": "the training or validation data changed (files, their sizes, labels or splits); restore the data, "
    "or start a new run",
    "device": "it ran on {before}, here it would run on {now}; set --runtime.device={before}, or start a new run",
    "precision": "it ran in {before}, here it would run in {now} (the device decides for runtime.precision=auto); "
    "continue where {before} is native, or start a new run",
    "threads": "it ran with {before} threads, here are {now}, and sums differ in the last bits; set "
    "--runtime.threads={before}",
    "frozen_sha256": "the frozen weights are not those that it was trained on: another backbone, or another torch or "
    "machine whose singular vectors or gradients differ in the last bits; start a new run",
}


def run_conditions(
    detector: Detector, train_set: FrameDataset, val_set: FrameDataset, precision: str
) -> dict[str, Any]:
    """What must be the same when the run is resumed; the frozen weights come last, as others may explain them."""
    return {
        "data_sha256": data_sha256(train_set, val_set),
        "device": next(detector.parameters()).device.type,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "frozen_sha256": frozen_sha256(detector),
    }


def data_sha256(*datasets: FrameDataset) -> str:
    """SHA-256 over path, size in bytes, label and split of every sample, in order, as hex. No file is read."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for sample in dataset.samples:
            in_memory = dataset.images is not None and sample.path in dataset.images
            size = len(dataset.images[sample.path]) if in_memory else byte_size(sample.path)
            if size == 0:  # reported before the first step, not hours into an epoch
                raise UnreadableImage(f"{sample.path} is empty (0 bytes)")
            digest.update(json.dumps([sample.path, size, sample.label, sample.split]).encode())
        digest.update(b"\0")
    return digest.hexdigest()
