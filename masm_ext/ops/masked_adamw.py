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
    """One masked AdamW step over every block of a model, with learning-state sums from the same pass.

    For training use :class:`masm_ext.MaskedAdamW`, which keeps the state. All tensors are contiguous and on one device;
    what is updated is updated in place. The formula: ``masm_ext/reference/masked_adamw.py``.

    Args:
        params: T parameters of any shape.
        grads: their gradients.
        exp_avgs: first moments, float32 for half-precision parameters, else of the parameter's dtype.
        exp_avg_sqs: second moments, likewise.
        penalties: gradients of penalties, like the moments, applied as decoupled weight decay is: ``p -= lr *
            penalty``. An empty tensor for a parameter without one; an empty list for none at all.
        steps: int64 [B], steps taken of each block.
        mask: float32 [B], in [0, 1]. A block of mask 0 keeps parameters, moments and step count; a mask between scales
            update, decay and penalty.
        segments: int64 [S, 4], rows (tensor, begin, end, block) of flat element ranges.
        hyper: float64 [T, 5], rows (lr, beta1, beta2, eps, weight_decay).
        grad_scale: float32 [1], divides the gradients.
        found_inf: float32 [1]; if not 0, nothing is written.

    Returns:
        stats float64 [B, 2] and found float32 [1]. Per block, with m the first moment before the step and t the steps
        before it: ``signal = <g, m> / (1 - beta1^t)`` and ``power = ||g||^2``; zero for masked blocks and at t = 0.
        found is 0, or 1 where a gradient was not finite and nothing was written.

    Raises:
        RuntimeError: wrong shapes or dtypes; on the CPU also segments that overlap or lie outside their tensor or the
            blocks, and masks outside [0, 1]. On CUDA the host cannot check those without waiting: found is 2, and
            nothing is written. Overlapping segments are undefined behaviour on CUDA.
    """
    result = torch.ops.masm.masked_adamw_(
        params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale, found_inf
    )
    if not torch.compiler.is_compiling():
        # autograd then refuses a backward pass through the old values
        torch.autograd.graph.increment_version([*params, *exp_avgs, *exp_avg_sqs, steps])
    return result
