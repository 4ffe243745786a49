"""The training loop: one step, one epoch, and the state that makes a killed run go on bit for bit.

Everything random is a function of (seed, epoch, index) or is in the checkpoint: the order of an epoch, the
augmentation of an image, the generator that dropout draws from.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from . import checkpoint
from .config import OptimConfig, RuntimeConfig
from .data.images import FrameDataset, UnreadableImage
from .errors import UserError
from .evaluate import predict
from .layers import WeightDrift
from .methods import Method
from .models.detector import Detector
from .results import finite, write_text
from .runtime import autocast, choose_attention, resolve_precision


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says at which step and what to change."""


@dataclass
class Position:
    """Where a run stands: the next batch to train on, and what this epoch has summed up so far."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    seen: int = 0
    task_sum: float = 0.0
    penalty_sum: float = 0.0
    seconds: float = 0.0


@dataclass
class FitResult:
    """What `fit` leaves: the detector holds the chosen weights. `history` has one dict an epoch, `mask_history` one
    a change.
    """

    history: list[dict[str, Any]]
    best_epoch: int
    best_val_auc: float
    steps: int
    images_per_second: float
    skipped_steps: int
    mask_history: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Best:
    """The best epoch so far by source-validation AUC (ties: lower validation loss) and its weights."""

    epoch: int = -1
    val_auc: float = -1.0
    val_loss: float = math.inf
    weights: dict[str, Tensor] = field(default_factory=dict)

    def beaten_by(self, val_auc: float, val_loss: float) -> bool:
        """Is an epoch with these validation numbers better?"""
        return (val_auc, -val_loss) > (self.val_auc, -self.val_loss)


def one_cycle(step: int, total: int, warmup: float, final: float) -> float:
    """Rate at `step` of `total` as a fraction of the peak: linear rise over `warmup` of the steps, cosine fall to
    `final`.
    """
    rise = max(1, round(warmup * total)) if warmup > 0 else 0
    if step < rise:
        return (step + 1) / (rise + 1)
    progress = (step - rise) / max(1, total - 1 - rise)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """The order in which epoch `epoch` visits `size` samples: a function of its arguments alone."""
    return np.random.default_rng([seed, epoch]).permutation(size).tolist()


def class_weights(labels: list[int], balance: bool) -> Tensor:
    """Loss weight of the classes [real, fake]: 1, 1, or inverse to their frequency with mean 1 over the samples."""
    if not balance:
        return torch.ones(2)
    counts = torch.bincount(torch.tensor(labels), minlength=2).float()
    return len(labels) / (2 * counts)


def task_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits [B] against labels [B] (1 = fake), weighted by class."""
    return F.binary_cross_entropy_with_logits(logits, labels.float(), weight=weights[labels])


def train_step(
    detector: Detector,
    method: Method,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Tensor,
    grad_clip: float | None,
    autocast_context: AbstractContextManager,
) -> tuple[float, float]:
    """One update from images [B, 3, H, W] and labels [B]; returns (task loss, penalty)."""
    with autocast_context:
        logits = detector(images)  # [B]
    task = task_loss(logits, labels, weights)
    penalty = method.penalty() if method.penalty is not None else torch.zeros((), device=task.device)
    (task + penalty).backward()
    if grad_clip is not None:
        # Masked blocks have no gradient and so no part in the norm.
        nn.utils.clip_grad_norm_([p for group in method.optimizer.param_groups for p in group["params"]], grad_clip)
    method.optimizer.step()
    method.optimizer.zero_grad(set_to_none=True)
    return task.item(), penalty.item()


def fit(
    detector: Detector,
    method: Method,
    train_set: FrameDataset,
    val_set: FrameDataset,
    *,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    workers: int = 0,
    folder: Path | None = None,
    resume: bool = False,
) -> FitResult:
    """Train `detector` by `method` on `train_set`, watching `val_set` (source validation, nothing else is ever
    looked at).

    With `folder`, writes `history.jsonl` and checkpoints under `last/`; with `resume`, goes on from there. At the
    end the detector holds the weights of the best validation epoch, or of the last one if `optim.select` is "last".
    """
    device = next(detector.parameters()).device
    precision = resolve_precision(runtime.precision, device)
    choose_attention(detector.backbone, device)
    weights = class_weights([sample.label for sample in train_set.samples], optim.class_balance).to(device)
    steps_per_epoch = math.ceil(len(train_set) / optim.batch_size)
    total = steps_per_epoch * optim.epochs
    drift = WeightDrift(detector)
    conditions = _conditions(detector, train_set, val_set, precision) if folder is not None else {}
    position, best, history = Position(), Best(), []
    torch.manual_seed(runtime.seed)
    if resume:
        position, best, history = _load(folder, detector, method, conditions)
        write_history(folder, history)

    bar = tqdm(
        total=total * optim.batch_size,
        initial=position.step * optim.batch_size,
        unit="img",
        desc=method.name,
        disable=not runtime.progress,
        smoothing=0.1,
    )
    with bar:
        while position.epoch < optim.epochs:
            train_set.set_epoch(position.epoch)
            detector.train()
            for images, labels in _batches(train_set, position, optim.batch_size, runtime.seed, workers, device):
                started = time.perf_counter()
                rate = one_cycle(position.step, total, optim.warmup, optim.final)
                for group in method.optimizer.param_groups:
                    group["lr"] = group["initial_lr"] * rate
                task, penalty = train_step(
                    detector,
                    method,
                    images,
                    labels,
                    weights=weights,
                    grad_clip=optim.grad_clip,
                    autocast_context=autocast(precision, device),
                )
                if not math.isfinite(task) and not method.is_masm:
                    raise TrainingError(f"the loss became {task} at step {position.step}: lower the learning rate")
                position.batch += 1
                position.step += 1
                position.seen += len(labels)
                position.task_sum += task * len(labels)
                position.penalty_sum += penalty * len(labels)
                position.seconds += time.perf_counter() - started
                bar.set_postfix(epoch=position.epoch, loss=f"{position.task_sum / position.seen:.3f}", refresh=False)
                bar.update(optim.batch_size)
                due = runtime.checkpoint_every and position.step % runtime.checkpoint_every == 0
                if folder is not None and due and position.batch < steps_per_epoch:
                    _save(folder, detector, method, conditions, position, best, history)

            history.append(_end_of_epoch(detector, method, val_set, position, drift, rate, runtime, precision, workers))
            if best.beaten_by(history[-1]["val_auc"], history[-1]["val_loss"]):
                best = Best(
                    position.epoch,
                    history[-1]["val_auc"],
                    history[-1]["val_loss"],
                    checkpoint.trainable_state(detector),
                )
            position = Position(epoch=position.epoch + 1, step=position.step)
            if folder is not None:
                _save(folder, detector, method, conditions, position, best, history)
                write_history(folder, history)

    if optim.select == "best":
        checkpoint.load_trainable_state(detector, best.weights)
    chosen = best.epoch if optim.select == "best" else optim.epochs - 1
    seconds = sum(entry["seconds"] for entry in history)
    return FitResult(
        history=history,
        best_epoch=chosen,
        best_val_auc=history[chosen]["val_auc"],
        steps=position.step,
        images_per_second=sum(entry["images"] for entry in history) / seconds if seconds else 0.0,
        skipped_steps=int(getattr(method.optimizer, "skipped_steps", 0)),
        mask_history=mask_history(method),
    )


def mask_history(method: Method) -> list[dict[str, Any]]:
    """The masks over time as plain lists: dicts with `step`, `mask` [L][K], `snr` [L][K]; empty without masks."""
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


def _batches(
    dataset: FrameDataset, position: Position, batch_size: int, seed: int, workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    order = epoch_order(len(dataset), seed, position.epoch)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)][position.batch :]
    # A generator of its own: the loader would draw from the global one that dropout uses, and a resumed epoch draws
    # again.
    loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, generator=torch.Generator())
    for batch in loader:
        yield batch["image"].to(device), torch.as_tensor(batch["label"]).to(device)


def _end_of_epoch(
    detector: Detector,
    method: Method,
    val_set: FrameDataset,
    position: Position,
    drift: WeightDrift,
    rate: float,
    runtime: RuntimeConfig,
    precision: str,
    workers: int,
) -> dict[str, Any]:
    logits = predict(detector, val_set, batch_size=runtime.eval_batch_size, precision=precision, workers=workers)
    if not torch.isfinite(logits).all():
        raise TrainingError(
            f"the detector's outputs are not finite after step {position.step}: lower the learning rates"
        )
    labels = torch.tensor([sample.label for sample in val_set.samples])
    entry = {
        "epoch": position.epoch,
        "step": position.step,
        "images": position.seen,
        "seconds": round(position.seconds, 3),
        "rate": rate,
        "train_loss": position.task_sum / position.seen,
        "penalty": position.penalty_sum / position.seen,
        "val_auc": float(roc_auc_score(labels.numpy(), logits.numpy())),
        "val_loss": float(task_loss(logits, labels, torch.ones(2))),
    }
    if drift:
        entry["drift"] = drift.ratios()
    if method.masks is not None:
        entry["active_fraction"] = float((method.masks.masks > 0).float().mean())
    if hasattr(method.optimizer, "skipped_steps"):
        entry["skipped_steps"] = int(method.optimizer.skipped_steps)
    return entry


# What must be as it was for a resumed run to equal an uninterrupted one, and what to say if it is not.
_CHANGED = {
    "frozen_sha256": "the frozen weights are not those that it was trained on: another backbone, or another torch or "
    "machine whose singular vectors differ in the last bits; start a new run",
    "data_sha256": "the training or validation data changed (files, their sizes, labels or splits); restore the data, "
    "or start a new run",
    "precision": "it ran in {before}, here it would run in {now} (the device decides for runtime.precision=auto); go "
    "on where {before} is native, or start a new run",
    "threads": "it ran with {before} threads, here are {now}, and sums differ in the last bits; give "
    "--runtime.threads={before}",
}


def _conditions(detector: Detector, train_set: FrameDataset, val_set: FrameDataset, precision: str) -> dict[str, Any]:
    return {
        "frozen_sha256": checkpoint.frozen_sha256(detector),
        "data_sha256": data_sha256(train_set, val_set),
        "precision": precision,
        "threads": torch.get_num_threads(),
    }


def data_sha256(*datasets: FrameDataset) -> str:
    """SHA-256 over path, size in bytes, label and split of every sample, in order; the contents are not read."""
    digest = hashlib.sha256()
    for dataset in datasets:
        for sample in dataset.samples:
            in_memory = dataset.images is not None and sample.path in dataset.images
            try:
                size = len(dataset.images[sample.path]) if in_memory else os.stat(sample.path).st_size
            except OSError as error:
                raise UnreadableImage(f"{sample.path} cannot be read ({error.strerror or error})") from error
            if size == 0:  # told before the first step, not hours into an epoch
                raise UnreadableImage(f"{sample.path} is empty (0 bytes)")
            digest.update(json.dumps([sample.path, size, sample.label, sample.split]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def _save(
    folder: Path,
    detector: Detector,
    method: Method,
    conditions: dict[str, Any],
    position: Position,
    best: Best,
    history: list[dict[str, Any]],
) -> None:
    cuda = next(detector.parameters()).is_cuda
    checkpoint.save(
        folder / "last",
        {
            "method": method.name,
            "conditions": conditions,
            "position": asdict(position),
            "weights": checkpoint.trainable_state(detector),
            "optimizer": method.optimizer.state_dict(),
            "masks": None if method.masks is None else method.masks.state_dict(),
            "best": asdict(best),
            "history": history,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state() if cuda else None,
        },
    )


def _load(
    folder: Path | None, detector: Detector, method: Method, conditions: dict[str, Any]
) -> tuple[Position, Best, list[dict[str, Any]]]:
    if folder is None:
        raise TrainingError("resume needs the folder of the run")
    state = checkpoint.load(folder / "last")
    if state["method"] != method.name:
        raise checkpoint.CheckpointError(f"{folder} was trained by {state['method']!r}, not by {method.name!r}")
    for name, now in conditions.items():
        before = state["conditions"][name]
        if before != now:
            reason = _CHANGED[name].format(before=before, now=now)
            raise checkpoint.CheckpointError(f"{folder} cannot be resumed: {reason}")
    checkpoint.load_trainable_state(detector, state["weights"])
    method.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))
    if method.masks is not None:
        method.masks.load_state_dict(state["masks"])
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"])
    return Position(**state["position"]), Best(**state["best"]), state["history"]
