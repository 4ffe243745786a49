"""The training loop: epochs of steps, validation after each, checkpoints in between.

A resumed run equals an uninterrupted one bit for bit. Everything random is a function of (seed, epoch, index), as the
order of an epoch and the augmentation of an image, or is in the checkpoint, as the generator that dropout draws from.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from masm_detect.config import OptimConfig, RuntimeConfig
from masm_detect.data.frames import FrameDataset
from masm_detect.data.loading import Batches
from masm_detect.distributed import ONE_PROCESS, Processes
from masm_detect.methods.layers import WeightDrift
from masm_detect.methods.method import Method
from masm_detect.methods.trainable import load_trainable_state, trainable_state
from masm_detect.models.detector import Detector
from masm_detect.runtime import autocast, choose_attention, resolve_precision
from masm_ext.progress import Progress

from .batches import epoch_batches, forgery_of
from .gpu_usage import GpuUsage, mean_busy
from .history import epoch_entry, mask_history, write_history
from .interrupt import CtrlC
from .scaling import LossScale
from .schedule import group_rates, one_cycle
from .state import Chosen, Position, load_state, run_conditions, save_state
from .step import class_weights, train_step
from .step_losses import StepLoss, StepLosses
from .trackers import Trackers

#: ||dW||_F / ||W||_F of a layer above which training warns. In the studies (benchmarks/generalization/results) the one
#: run with a larger value, 0.27, scored below the linear probe; those that learned had at most 0.15.
LARGEST_DRIFT = 0.25


@dataclass
class FitResult:
    """What `fit` reports; the detector itself holds the chosen weights.

    Attributes:
        history: one dict an epoch, as in `history.jsonl`
        seconds, waited: those of `Position`, summed over the epochs; validation and the checkpoint after it are not
            included
        peak_memory_bytes: most memory of all tensors in training; None on the CPU
        gpu_busy: share of the time in which a kernel ran, sampled; None on the CPU or without nvidia-ml-py
        val_logits: outputs [n] for the validation samples, float32, with the chosen weights
        mask_history: one dict for each change of the masks
    """

    history: list[dict[str, Any]]
    best_epoch: int
    best_val_auc: float
    val_logits: torch.Tensor
    steps: int
    images_per_second: float
    seconds: float
    waited: float
    skipped_steps: int
    peak_memory_bytes: int | None = None
    gpu_busy: float | None = None
    mask_history: list[dict[str, Any]] = field(default_factory=list)


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
    ranks: Processes = ONE_PROCESS,
    trackers: Trackers | None = None,
) -> FitResult:
    """Train `detector` by `method` on `train_set` and validate it on `val_set` after each epoch.

    Args:
        detector: made trainable by `method`.
        method: of `methods.build.build_method`.
        train_set: the training samples, with augmentation.
        val_set: source validation; the best epoch is chosen on it.
        optim: epochs, batch size and schedule.
        runtime: precision, workers, seed, checkpoints.
        folder: where `history.jsonl` and the checkpoints (`last/`) are written; None: nothing is written.
        resume: continue from the checkpoint in `folder`.
        ranks: the processes that divide each batch and the validation (`distributed.processes`); the first one writes
            the files.
        trackers: where the numbers are also sent; None: nowhere.

    Returns:
        The numbers of the run. The detector holds the weights of the best validation epoch, or of the last epoch if
        `optim.select` is "last".

    Raises:
        Interrupted: Ctrl-C; the current step was completed and its checkpoint is written. A second Ctrl-C raises
            KeyboardInterrupt at once.
        TrainingError: a loss, an output or a weight is not finite.
    """
    trackers = trackers or Trackers()
    run = _Run(detector, method, train_set, val_set, optim, runtime, folder, ranks, trackers)
    torch.manual_seed(runtime.seed)
    if resume:
        run.restore()
        if run.position.epoch >= optim.epochs and runtime.progress:
            Progress.write("the run was finished before: no epoch is left to train", file=sys.stderr)
    bar = Progress(
        total=run.images_per_epoch * optim.epochs,
        initial=run.images_done(),
        unit="img",
        desc=method.name,
        disable=not runtime.progress,
        smoothing=0.1,
    )
    with bar, CtrlC(wait=folder is not None) as ctrl_c, trackers.running(run.position.step):
        while run.position.epoch < optim.epochs:
            rate = run.train_epoch(bar, ctrl_c)
            run.end_epoch(rate)
            ctrl_c.pressed = ranks.any(ctrl_c.pressed)
            ctrl_c.raise_if_pressed(run.position.step)
    load_trainable_state(detector, run.chosen.weights)
    return run.result()


class _Run:
    """The parts of a run that its epochs share, and its position."""

    def __init__(
        self,
        detector: Detector,
        method: Method,
        train_set: FrameDataset,
        val_set: FrameDataset,
        optim: OptimConfig,
        runtime: RuntimeConfig,
        folder: Path | None,
        ranks: Processes,
        trackers: Trackers,
    ) -> None:
        self.trackers = trackers
        self.ranks, self.model = ranks, ranks.parallel(detector)
        self.detector, self.method, self.train_set, self.val_set = detector, method, train_set, val_set
        self.optim, self.runtime, self.folder = optim, runtime, folder
        self.device = next(detector.parameters()).device
        self.precision = resolve_precision(runtime.precision, self.device)
        self.loss_scale = LossScale(self.precision, self.device)
        choose_attention(detector.backbone, self.device)
        first = self.batches(0)  # every epoch has as many
        labels = train_set.samples.labels[[index for batch in first for index in batch]].tolist()
        self.class_weights = class_weights(labels, optim.class_balance).to(self.device)
        self.steps_per_epoch, self.images_per_epoch = len(first), len(labels)
        fakes = sorted({sample.method for sample in train_set.samples if sample.label == 1})
        self.forgeries = {name: number for number, name in enumerate(fakes)}
        self.drift, self.losses, self.usage = WeightDrift(detector), StepLosses(), GpuUsage(self.device)
        self.conditions = {} if folder is None else run_conditions(detector, train_set, val_set, self.precision)
        self.position, self.chosen = Position(), Chosen()
        self.history: list[dict[str, Any]] = []
        self._warned = False

    def batches(self, epoch: int) -> list[list[int]]:
        """The batches of an epoch, as indices of training samples."""
        optim = self.optim
        return epoch_batches(self.train_set.samples, optim.batch_size, self.runtime.seed, epoch, optim.batches)

    def images_done(self) -> int:
        """Images trained on before the current position."""
        begun = self.batches(self.position.epoch)[: self.position.batch]
        return self.images_per_epoch * self.position.epoch + sum(map(len, begun))

    def restore(self) -> None:
        """Continue from the last checkpoint."""
        state = load_state(self.folder, self.detector, self.method, self.conditions, self.loss_scale)
        self.position, self.chosen, self.history = state
        self.write_history()

    def save(self) -> None:
        """Write a checkpoint, in the first process."""
        state = self.position, self.chosen, self.history
        if self.ranks.is_first:
            save_state(self.folder, self.detector, self.method, self.conditions, *state, self.loss_scale)

    def train_epoch(self, bar: Progress, ctrl_c: CtrlC) -> float:
        """The rest of the current epoch; returns the rate of its last step, as a fraction of the peak."""
        position, optim = self.position, self.optim
        self.train_set.set_epoch(position.epoch)
        self.detector.train()
        self.usage.start()
        whole = self.batches(position.epoch)[position.batch :]
        own = [self.ranks.share(batch) for batch in whole]
        batches = Batches(self.train_set, own, self.device, self.runtime.workers)
        clock = _Clock(position, batches)
        for (images, labels), indices in zip(batches, whole):  # [B, 3, H, W], [B]
            self.usage.sample()
            if self.ranks.size > 1:  # dropout: other numbers in every process, the same ones after a resume
                torch.manual_seed(self.runtime.seed * 1_000_003 + position.step * self.ranks.size + self.ranks.rank)
            rate = self.rate(position.step)
            for group in self.method.optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            task, penalty = train_step(
                self.model,
                self.method,
                images,
                labels,
                weights=self.class_weights,
                optim=optim,
                autocast_context=autocast(self.precision, self.device),
                forgery=self.forgeries.get(forgery_of(self.train_set.samples, indices)),
                ranks=self.ranks,
                whole=len(indices),
                loss_scale=self.loss_scale,
            )
            self.add(self.losses.put(position.step, len(indices), task, penalty))
            position.batch += 1
            position.step += 1
            every = self.runtime.checkpoint_every
            # all processes stop after the same step
            stop = position.step % self.ranks.steps_between_flags == 0 and self.ranks.any(ctrl_c.pressed)
            due = stop or (every and position.step % every == 0)
            if self.folder is not None and due and position.batch < self.steps_per_epoch:
                self.add(self.losses.drain())
                clock.read()
                self.save()
                if stop:
                    self.ranks.wait()  # until the first process has written it: the end of one may end all
                    ctrl_c.pressed = True
                    ctrl_c.raise_if_pressed(position.step)
            # After the checkpoint: drawing fails if the same Ctrl-C has closed the terminal or pipe.
            bar.set_postfix(epoch=position.epoch, loss=f"{position.mean_losses()[0]:.3f}", refresh=False)
            bar.update(len(indices))
        self.add(self.losses.drain())
        clock.read()
        return rate

    def rate(self, step: int) -> float:
        """Learning rate of a step as a fraction of the peak."""
        optim = self.optim
        return one_cycle(step, self.steps_per_epoch * optim.epochs, optim.warmup, optim.final)

    def add(self, losses: list[StepLoss]) -> None:
        """Add losses that have reached the host to those of the epoch, and track them."""
        self.position.add(losses, self.method)
        groups = self.method.optimizer.param_groups
        self.trackers.steps(losses, lambda step: group_rates(groups, self.rate(step)))

    def end_epoch(self, rate: float) -> None:
        """Validate, keep the weights if they are the best so far, and write a checkpoint."""
        used = self.usage.numbers()  # before validation
        entry, logits = epoch_entry(
            self.detector,
            self.method,
            self.val_set,
            self.position,
            drift=self.drift.ratios() if self.drift else None,
            rate=rate,
            runtime=self.runtime,
            precision=self.precision,
            ranks=self.ranks,
        )
        self.history.append(entry | used)
        self.trackers.epoch(self.history[-1])
        self._warn_of_drift(entry.get("drift", {}))
        auc, loss = entry["val_auc"], entry["val_loss"]
        kept = self.optim.select == "last" or self.chosen.is_worse_than(auc, loss)
        if kept:
            self.chosen = Chosen(self.position.epoch, auc, loss, trainable_state(self.detector), logits)
        if self.runtime.progress:
            number = f"epoch {self.position.epoch + 1} of {self.optim.epochs}"
            best = ", the best so far" if kept and self.optim.select == "best" else ""
            Progress.write(f"{number}: validation AUC {auc:.3f}{best}; loss {loss:.3f}", file=sys.stderr)
        self.position = Position(epoch=self.position.epoch + 1, step=self.position.step)
        if self.folder is not None:
            self.save()
            self.write_history()

    def write_history(self) -> None:
        """Write `history.jsonl`, in the first process."""
        if self.ranks.is_first:
            write_history(self.folder, self.history)

    def _warn_of_drift(self, drift: dict[str, float]) -> None:
        """Warn once if a weight has moved so far that little of the pretrained one can be left."""
        name = max(drift, key=drift.get, default=None)
        if name is not None and drift[name] > LARGEST_DRIFT and not self._warned and self.ranks.is_first:
            self._warned = True
            warnings.warn(
                f"after epoch {self.position.epoch + 1}, ||dW|| / ||W|| of {name} is {drift[name]:.2f}, above "
                f"{LARGEST_DRIFT}: the backbone forgets what it knew; lower the learning rates",
                stacklevel=2,
            )

    def result(self) -> FitResult:
        """The numbers of the finished run."""
        history = self.history
        seconds, waited = (sum(entry[name] for entry in history) for name in ("seconds", "waited"))
        return FitResult(
            history=history,
            best_epoch=self.chosen.epoch,
            best_val_auc=self.chosen.val_auc,
            val_logits=self.chosen.val_logits,
            steps=self.position.step,
            images_per_second=sum(entry["images"] for entry in history) / seconds if seconds else 0.0,
            seconds=seconds,
            waited=waited,
            skipped_steps=int(getattr(self.method.optimizer, "skipped_steps", self.loss_scale.skipped)),
            peak_memory_bytes=max((entry.get("peak_memory_bytes", 0) for entry in history), default=0) or None,
            gpu_busy=mean_busy(history),
            mask_history=mask_history(self.method),
        )


class _Clock:
    """Adds the time since it was made to that of a position, which a resumed epoch starts with."""

    def __init__(self, position: Position, batches: Batches) -> None:
        self._position, self._batches = position, batches
        self._seconds, self._waited = position.seconds, position.waited
        self._started = time.perf_counter()

    def read(self) -> None:
        """Update `seconds` and `waited` of the position."""
        self._position.seconds = self._seconds + time.perf_counter() - self._started
        self._position.waited = self._waited + self._batches.waited
