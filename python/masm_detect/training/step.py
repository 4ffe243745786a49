"""One training step: forward, task loss, backward, update."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masm_detect.config import OptimConfig
from masm_detect.methods.method import Method
from masm_detect.models.detector import Detector

from .metric_losses import alignment_loss, uniformity_loss


def train_step(
    detector: Detector,
    method: Method,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Tensor,
    optim: OptimConfig,
    autocast_context: AbstractContextManager,
    forgery: int | None = None,
) -> tuple[Tensor, Tensor]:
    """One update of the trainable weights.

    Args:
        images: [B, 3, H, W] float32. labels: [B] int64, 1 = fake.
        weights: [2] loss weights of real and fake.
        optim: its `grad_clip`, `alignment` and `uniformity` are read.
        autocast_context: precision of the forward pass.
        forgery: number of the forgery of this batch, for masks that compare the gradients of forgeries.

    Returns:
        (task loss, penalty and losses on features), scalars on the device. The host does not wait for the device here.
    """
    if method.masks is not None and forgery is not None:
        method.masks.domain = forgery
    task, on_features = _losses(detector, images, labels, weights, optim, autocast_context)
    (task if on_features is None else task + on_features).backward()
    if optim.grad_clip is not None:
        # Masked blocks have no gradient, so they do not add to the norm.
        trained = [p for group in method.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, optim.grad_clip)
    method.optimizer.step()
    method.optimizer.zero_grad(set_to_none=True)
    penalty = method.penalty() if method.penalty is not None else torch.zeros((), device=task.device)
    return task.detach(), penalty if on_features is None else penalty + on_features.detach()


def _losses(
    detector: Detector,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
    optim: OptimConfig,
    autocast_context: AbstractContextManager,
) -> tuple[Tensor, Tensor | None]:
    """The task loss, and the weighted losses on features, None without any."""
    if not (optim.alignment or optim.uniformity):
        with autocast_context:
            logits = detector(images)  # [B]
        return task_loss(logits, labels, weights), None
    with autocast_context:
        logits, features = detector(images, return_features=True)  # [B], [B, feature_dim]
    loss = optim.alignment * alignment_loss(features, labels) + optim.uniformity * uniformity_loss(features)
    return task_loss(logits, labels, weights), loss


def task_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits [B] against labels [B] (1 = fake), weighted by class."""
    return F.binary_cross_entropy_with_logits(logits, labels.float(), weight=weights[labels])


def class_weights(labels: list[int], balance: bool) -> Tensor:
    """Loss weights [2] of real and fake: 1 and 1, or if `balance` inverse to their frequency, mean 1 over samples."""
    if not balance:
        return torch.ones(2)
    counts = torch.bincount(torch.tensor(labels), minlength=2).float()
    return len(labels) / (2 * counts)
