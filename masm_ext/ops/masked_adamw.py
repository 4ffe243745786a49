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

    Arguments and results: :func:`masm_ext.reference.masked_adamw_`. All tensors contiguous, on one device. For training
    use :class:`masm_ext.MaskedAdamW`, which keeps the state.

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
