"""masm::masked_adamw_: one AdamW step over all blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the schemas)
from ..contract import check_masked_adamw


@torch.library.register_fake("masm::masked_adamw_")
def _fake(params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale, found_inf):
    check_masked_adamw(
        params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale, found_inf
    )
    return hyper.new_empty(mask.shape[0], 2), mask.new_empty(1)


def masked_adamw_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    penalties: list[Tensor],
    steps: Tensor,
    mask: Tensor,
    segments: Tensor,
    hyper: Tensor,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One masked AdamW step over every block of a model; returns the gradient statistics of the blocks.

    For training use :class:`masm_ext.MaskedAdamW`, which keeps the state. All tensors are contiguous and on one device.
    Parameters, moments and steps are updated in place. ``masm_ext/reference/masked_adamw.py`` has the formula.

    Args:
        params: T parameters of any shape.
        grads: the gradients of the parameters.
        exp_avgs: first moments: float32 for half-precision parameters, else in the dtype of the parameter.
        exp_avg_sqs: second moments, likewise.
        penalties: gradients of the penalties, in the dtype of the moments, applied like decoupled weight decay: ``p -=
            lr * penalty``. An empty tensor: no penalty for this parameter. An empty list: no penalties at all.
        steps: int64 [B], number of steps taken by each block.
        mask: float32 [B], in [0, 1]. A block with mask 0 keeps its parameters, moments and step count; a mask between 0
            and 1 scales its update, weight decay and penalty.
        segments: int64 [S, 4], rows (tensor, begin, end, block): a range of elements of a flattened parameter, and its
            block.
        hyper: float64 [T, 5], rows (lr, beta1, beta2, eps, weight_decay).
        grad_scale: float32 [1]; the gradients are divided by it.
        found_inf: float32 [1]; if it is not 0, nothing is written.

    Returns:
        stats, float64 [B, 2], and found, float32 [1]. Per block, with m the first moment before the step and t the
        number of steps before it: ``signal = <g, m> / (1 - beta1^t)`` and ``power = ||g||^2``; both are zero for masked
        blocks and at t = 0. found is 0 if the step was taken, and 1 if it was skipped (a gradient is not finite, or
        ``found_inf`` is set).

    Raises:
        RuntimeError: wrong shapes or dtypes. On the CPU also if segments overlap, a segment lies outside its tensor or
            the blocks, or a mask is outside [0, 1]. On CUDA these are not raised, because checking them would
            synchronize: found is 2 and nothing is written, except that overlapping segments are undefined behaviour.
    """
    result = torch.ops.masm.masked_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale, found_inf
    )
    if not torch.compiler.is_compiling():
        # autograd then refuses a backward pass through the old values
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, steps])
    return result
