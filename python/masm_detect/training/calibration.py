"""The batches and the loss on which a method looks at the pretrained model before training."""

from __future__ import annotations

import torch
from torch import Tensor

from masm_detect.config import OptimConfig
from masm_detect.data.frames import FrameDataset
from masm_detect.data.loading import Batches
from masm_detect.methods.method import Calibration
from masm_detect.models.detector import Detector

from .batches import epoch_batches
from .step import class_weights, task_loss


def calibration_on(
    train_set: FrameDataset, optim: OptimConfig, seed: int, device: torch.device, workers: int | None = None
) -> Calibration:
    """The batches of the first epoch, and the loss without weights of the classes. Nothing is read yet."""
    first_epoch = epoch_batches(train_set.samples, optim.batch_size, seed, 0, optim.batches)
    return Calibration(Batches(train_set, first_epoch, device, workers), calibration_loss)


def calibration_loss(detector: Detector, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The cross-entropy of (images [B, 3, H, W], labels [B]), a scalar."""
    images, labels = batch
    return task_loss(detector(images), labels, class_weights([], balance=False).to(labels.device))
