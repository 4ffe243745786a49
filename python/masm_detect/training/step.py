"""One training step: forward, task loss, backward, update."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masm_detect.methods.method import Method
from masm_detect.models.detector import Detector


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
    """One update of the trainable weights.

    Args:
        images: [B, 3, H, W] float32. labels: [B] int64, 1 = fake.
        weights: [2] loss weights of real and fake.
        grad_clip: largest norm of the gradient of all weights together; None: not clipped.
        autocast_context: precision of the forward pass.

    Returns:
        (task loss, penalty), scalars on the device. The host does not wait for the device here.
    """
    with autocast_context:
        logits = detector(images)  # [B]
    task = task_loss(logits, labels, weights)
    task.backward()
    if grad_clip is not None:
        # Masked blocks have no gradient, so they do not add to the norm.
        nn.utils.clip_grad_norm_([p for group in method.optimizer.param_groups for p in group["params"]], grad_clip)
    method.optimizer.step()
    method.optimizer.zero_grad(set_to_none=True)
    penalty = method.penalty() if method.penalty is not None else torch.zeros((), device=task.device)
    return task.detach(), penalty


def task_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean binary cross-entropy of logits [B] against labels [B] (1 = fake), weighted by class."""
    return F.binary_cross_entropy_with_logits(logits, labels.float(), weight=weights[labels])


def class_weights(labels: list[int], balance: bool) -> Tensor:
    """Loss weights [2] of real and fake: 1 and 1, or if `balance` inverse to their frequency, mean 1 over samples."""
    if not balance:
        return torch.ones(2)
    counts = torch.bincount(torch.tensor(labels), minlength=2).float()
    return len(labels) / (2 * counts)
