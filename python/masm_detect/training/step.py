"""One training step: forward, task loss, backward, update."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masm_detect.config import OptimConfig
from masm_detect.distributed import ONE_PROCESS, Processes
from masm_detect.methods.method import Method

from .metric_losses import alignment_loss, uniformity_loss
from .scaling import LossScale

UNSCALED = LossScale()


def train_step(
    model: nn.Module,
    method: Method,
    images: Tensor,
    labels: Tensor,
    *,
    weights: Tensor,
    optim: OptimConfig,
    autocast_context: AbstractContextManager,
    forgery: int | None = None,
    ranks: Processes = ONE_PROCESS,
    whole: int | None = None,
    loss_scale: LossScale = UNSCALED,
) -> tuple[Tensor, Tensor]:
    """One update of the trainable weights.

    Args:
        model: the detector, or `ranks.parallel` of it.
        images: [B, 3, H, W] float32. labels: [B] int64, 1 = fake. With several processes, the share of this one.
        weights: [2] loss weights of real and fake.
        optim: its `grad_clip`, `micro_batch`, `alignment` and `uniformity` are read.
        autocast_context: precision of the forward pass.
        forgery: number of the forgery of this batch, for masks that compare the gradients of forgeries.
        ranks: the processes that divide the batch.
        whole: size of the whole batch; None: B.
        loss_scale: factor of the whole loss in fp16, which the update removes.

    Returns:
        (task loss, penalty and losses on features), scalars on the device, of the whole batch. The host does not wait
        for the device here.
    """
    if method.masks is not None and forgery is not None:
        method.masks.domain = forgery
    whole = len(labels) if whole is None else whole
    scale = ranks.loss_scale(len(labels), whole)
    size = optim.micro_batch or max(1, len(labels))
    parts = list(zip(images.split(size), labels.split(size)))
    task = on_features = None
    for number, (own_images, own_labels) in enumerate(parts):
        last = number == len(parts) - 1
        with nullcontext() if last else ranks.without_averaging(model):
            loss, on_features = _losses(model, own_images, own_labels, weights, optim, autocast_context, ranks, whole)
            loss = loss * (scale * len(own_labels) / len(labels)) if len(parts) > 1 or scale != 1 else loss
            loss_scale.scaled(loss if on_features is None else loss + on_features).backward()
        task = loss.detach() if task is None else task + loss.detach()
    if optim.grad_clip is not None:
        loss_scale.unscale(method.optimizer)
        # Masked blocks have no gradient, so they do not add to the norm.
        trained = [p for group in method.optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(trained, optim.grad_clip)
    loss_scale.step(method.optimizer)
    method.optimizer.zero_grad(set_to_none=True)
    penalty = method.penalty() if method.penalty is not None else torch.zeros((), device=task.device)
    return ranks.mean(task), penalty if on_features is None else penalty + on_features.detach()


def _losses(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    weights: Tensor,
    optim: OptimConfig,
    autocast_context: AbstractContextManager,
    ranks: Processes,
    whole: int,
) -> tuple[Tensor, Tensor | None]:
    """The task loss, and the weighted losses on features, None without any."""
    if not (optim.alignment or optim.uniformity):
        with autocast_context:
            logits = model(images)  # [B]
        return task_loss(logits, labels, weights), None
    with autocast_context:
        logits, features = model(images, return_features=True)  # [B], [B, feature_dim]
    features, everywhere = ranks.features(features, labels, whole)
    loss = optim.alignment * alignment_loss(features, everywhere) + optim.uniformity * uniformity_loss(features)
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
