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
import signal
import threading
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from tqdm import tqdm

from . import checkpoint
from .config import OptimConfig, RuntimeConfig
from .data.images import FrameDataset, UnreadableImage
from .data.loading import Batches
from .errors import UserError
from .evaluate import predict
from .layers import WeightDrift
from .meter import BusyMean, Meter
from .methods import Method
from .models.detector import Detector
from .results import finite, write_text
from .runtime import autocast, choose_attention, resolve_precision
from .step_losses import StepLoss, StepLosses


class Interrupted(KeyboardInterrupt):
    """Training was interrupted after a step whose checkpoint is written."""


class TrainingError(UserError, RuntimeError):
    """Training cannot go on; the message says at which step and what to change."""


@dataclass
class Position:
    """Where a run stands: the next batch to train on, and what this epoch has summed up so far.

    `seen`: images trained on; `counted`: those of them whose losses are in the sums. `seconds`: wall time from asking
    for the first batch to the end of the last step, checkpoints in between included; `waited`: those of them in which
    the host was blocked until a batch was there.
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
        """Sum up losses that have arrived. Raises TrainingError for one that is not finite, but with MASM, whose
        optimizer skips such a step: it is left out.
        """
        for loss in losses:
            if not math.isfinite(loss.task) and not method.is_masm:
                raise TrainingError(f"the loss became {loss.task} at step {loss.step}: lower the learning rate")
            self.seen += loss.images
            if math.isfinite(loss.task) and math.isfinite(loss.penalty):
                self.counted += loss.images
                self.task_sum += loss.task * loss.images
                self.penalty_sum += loss.penalty * loss.images

    def mean_losses(self) -> tuple[float, float]:
        """Mean (task loss, penalty) an image; NaN if there was none."""
        return tuple(total / self.counted if self.counted else math.nan for total in (self.task_sum, self.penalty_sum))


@dataclass
class FitResult:
    """What `fit` leaves: the detector holds the chosen weights. `history` has one dict an epoch, `mask_history` one
    a change.

    `seconds` and `waited` are those of `Position`, over all epochs; validation and the checkpoint after it are not in
    them. On CUDA, `peak_memory_bytes` is the most that tensors took in training, and `gpu_busy` the share of the time
    in which a kernel ran, sampled (None without nvidia-ml-py).
    """

    history: list[dict[str, Any]]
    best_epoch: int
    best_val_auc: float
    steps: int
    images_per_second: float
    seconds: float
    waited: float
    skipped_steps: int
    peak_memory_bytes: int | None = None
    gpu_busy: float | None = None
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


def epoch_batches(size: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """`epoch_order` in batches."""
    order = epoch_order(size, seed, epoch)
    return [order[start : start + batch_size] for start in range(0, size, batch_size)]


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
) -> tuple[Tensor, Tensor]:
    """One update from images [B, 3, H, W] and labels [B]; returns (task loss, penalty), scalars on the device: nothing
    here waits for it.
    """
    with autocast_context:
        logits = detector(images)  # [B]
    task = task_loss(logits, labels, weights)
    task.backward()
    if grad_clip is not None:
        # Masked blocks have no gradient and so no part in the norm.
        nn.utils.clip_grad_norm_([p for group in method.optimizer.param_groups for p in group["params"]], grad_clip)
    method.optimizer.step()
    method.optimizer.zero_grad(set_to_none=True)
    penalty = method.penalty() if method.penalty is not None else torch.zeros((), device=task.device)
    return task.detach(), penalty


def fit(
    detector: Detector,
    method: Method,
    train_set: FrameDataset,
    val_set: FrameDataset,
    *,
    optim: OptimConfig,
    runtime: RuntimeConfig,
    folder: Path | None = None,
    resume: bool = False,
) -> FitResult:
    """Train `detector` by `method` on `train_set`, watching `val_set` (source validation, nothing else is ever
    looked at).

    With `folder`, writes `history.jsonl` and checkpoints under `last/`; with `resume`, goes on from there. Ctrl-C ends
    it after the step at hand with a checkpoint (`Interrupted`), a second one at once. At the end the detector holds the
    weights of the best validation epoch, or of the last one if `optim.select` is "last".
    """
    device = next(detector.parameters()).device
    precision = resolve_precision(runtime.precision, device)
    choose_attention(detector.backbone, device)
    weights = class_weights([sample.label for sample in train_set.samples], optim.class_balance).to(device)
    steps_per_epoch = math.ceil(len(train_set) / optim.batch_size)
    total = steps_per_epoch * optim.epochs
    drift, losses, usage = WeightDrift(detector), StepLosses(), _GpuUsage(device)
    conditions = _conditions(detector, train_set, val_set, precision) if folder is not None else {}
    position, best, history = Position(), Best(), []
    torch.manual_seed(runtime.seed)
    if resume:
        position, best, history = _load(folder, detector, method, conditions)
        write_history(folder, history)

    bar = tqdm(
        total=len(train_set) * optim.epochs,
        initial=len(train_set) * position.epoch + position.batch * optim.batch_size,
        unit="img",
        desc=method.name,
        disable=not runtime.progress,
        smoothing=0.1,
    )
    with bar, _CtrlC(wait=folder is not None) as ctrl_c:
        while position.epoch < optim.epochs:
            train_set.set_epoch(position.epoch)
            detector.train()
            usage.start()
            batches = epoch_batches(len(train_set), optim.batch_size, runtime.seed, position.epoch)[position.batch :]
            batches = Batches(train_set, batches, device, runtime.workers)
            clock = _Clock(position, batches)
            for images, labels in batches:
                usage.sample()
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
                position.add(losses.put(position.step, len(labels), task, penalty), method)
                position.batch += 1
                position.step += 1
                due = runtime.checkpoint_every and position.step % runtime.checkpoint_every == 0
                if folder is not None and (due or ctrl_c.pressed) and position.batch < steps_per_epoch:
                    position.add(losses.drain(), method)
                    clock.read()
                    _save(folder, detector, method, conditions, position, best, history)
                    ctrl_c.raise_if_pressed(position.step)
                # after the checkpoint: who pressed Ctrl-C may have closed what the bar is drawn on
                bar.set_postfix(epoch=position.epoch, loss=f"{position.mean_losses()[0]:.3f}", refresh=False)
                bar.update(len(labels))
            position.add(losses.drain(), method)
            clock.read()

            used = usage.numbers()
            entry = _end_of_epoch(detector, method, val_set, position, drift, rate, runtime, precision)
            history.append(entry | used)
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
            ctrl_c.raise_if_pressed(position.step)

    if optim.select == "best":
        checkpoint.load_trainable_state(detector, best.weights)
    chosen = best.epoch if optim.select == "best" else optim.epochs - 1
    seconds, waited = (sum(entry[name] for entry in history) for name in ("seconds", "waited"))
    return FitResult(
        history=history,
        best_epoch=chosen,
        best_val_auc=history[chosen]["val_auc"],
        steps=position.step,
        images_per_second=sum(entry["images"] for entry in history) / seconds if seconds else 0.0,
        seconds=seconds,
        waited=waited,
        skipped_steps=int(getattr(method.optimizer, "skipped_steps", 0)),
        peak_memory_bytes=max((entry.get("peak_memory_bytes", 0) for entry in history), default=0) or None,
        gpu_busy=_mean_busy(history),
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


class _CtrlC:
    """Inside, the first Ctrl-C is noted only; a second one raises KeyboardInterrupt as ever. So it is if `wait`, in the
    main thread, which alone hears it, and where nobody else has said what a Ctrl-C does.
    """

    def __init__(self, wait: bool) -> None:
        self.pressed = False
        main = threading.current_thread() is threading.main_thread()
        self._wait = wait and main and signal.getsignal(signal.SIGINT) is signal.default_int_handler

    def __enter__(self) -> _CtrlC:
        if self._wait:
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._wait:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _note(self, *_: object) -> None:
        if self.pressed:
            raise KeyboardInterrupt
        self.pressed = True
        with suppress(OSError):  # nobody may read it: `2>&1 | tee` is stopped by the same Ctrl-C
            # not print: a handler may come in the middle of one
            os.write(2, b"\nstopping with a checkpoint after this step, or after the validation that it leads to; "
                     b"Ctrl-C again stops at once\n")  # fmt: skip

    def raise_if_pressed(self, step: int) -> None:
        if self.pressed:
            raise Interrupted(f"interrupted after step {step}, whose checkpoint is written")


class _Clock:
    """Keeps the times of a position, which may be that of a resumed epoch; made where the first batch is asked for."""

    def __init__(self, position: Position, batches: Batches) -> None:
        self._position, self._batches = position, batches
        self._seconds, self._waited = position.seconds, position.waited
        self._started = time.perf_counter()

    def read(self) -> None:
        self._position.seconds = self._seconds + time.perf_counter() - self._started
        self._position.waited = self._waited + self._batches.waited


class _GpuUsage:
    """What an epoch takes of a GPU; nothing on the CPU. A resumed epoch counts from where it was resumed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._meter = Meter(device) if device.type == "cuda" else None

    def start(self) -> None:
        if self._meter is not None:
            torch.cuda.reset_peak_memory_stats(self._device)
            self._busy = BusyMean(self._meter)

    def sample(self) -> None:
        if self._meter is not None:
            self._busy.sample()

    def numbers(self) -> dict[str, Any]:
        if self._meter is None:
            return {}
        return {"peak_memory_bytes": torch.cuda.max_memory_allocated(self._device), "gpu_busy": self._busy.mean}


def _mean_busy(history: list[dict[str, Any]]) -> float | None:
    known = [entry for entry in history if entry.get("gpu_busy") is not None]
    seconds = sum(entry["seconds"] for entry in known)
    return sum(entry["gpu_busy"] * entry["seconds"] for entry in known) / seconds if seconds else None


def _end_of_epoch(
    detector: Detector,
    method: Method,
    val_set: FrameDataset,
    position: Position,
    drift: WeightDrift,
    rate: float,
    runtime: RuntimeConfig,
    precision: str,
) -> dict[str, Any]:
    logits = predict(
        detector, val_set, batch_size=runtime.eval_batch_size, precision=precision, workers=runtime.workers
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
    """Write the checkpoint, over the one before. Raises TrainingError instead if the weights are not finite: a gradient
    can overflow where the loss does not, which only the next loss would tell.
    """
    device = next(detector.parameters()).device
    weights = checkpoint.trainable_state(detector)
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
            "best": asdict(best),
            "history": history,
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
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
    masks = getattr(method.optimizer, "masks", None)
    if masks is not None:
        masks.accept_layers()  # weights and optimizer come from one checkpoint
    torch.set_rng_state(state["rng"])
    if state["rng_cuda"] is not None:
        torch.cuda.set_rng_state(state["rng_cuda"], next(detector.parameters()).device)
    return Position(**state["position"]), Best(**state["best"]), state["history"]
