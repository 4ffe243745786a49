"""The formula of masm::masked_adamw_."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import check_masked_adamw, wide


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
    """One AdamW step (arXiv 1711.05101) over the blocks whose mask is not 0, in place, with learning-state sums.

    T parameters of any shape and their gradients; exp_avgs, exp_avg_sqs and penalties like them, float32 for
    half-precision parameters; steps int64 [B], mask float32 [B], segments int64 [S, 4] rows (tensor, begin, end, block)
    of flat element ranges, hyper float64 [T, 5] rows (lr, beta1, beta2, eps, weight_decay). ``grad_scale`` divides the
    gradients. ``penalties`` are gradients of penalties, applied as decoupled weight decay is, without the moments:
    ``p -= lr * penalty``. A parameter without one has an empty tensor there; an empty list means no penalties.

    A masked block keeps parameters, moments and step count. A mask between 0 and 1 scales the update (and
    the decay and the penalty), not the moments. If any gradient of a live block, or its square, is not finite, or
    ``found_inf`` is set, nothing is written.

    Returns stats float64 [B, 2] and found [1]. Per block, with m the first moment before the step and t the steps
    before it: ``signal = <g, m> / (1 - beta1^t)`` and ``power = ||g||^2``; both zero for masked blocks and at t = 0.
    """
    check_masked_adamw(
        params, grads, exp_avgs, exp_avg_sqs, penalties, steps, mask, segments, hyper, grad_scale, found_inf
    )
    stats = hyper.new_zeros(mask.numel(), 2)
    scales, rows = mask.tolist(), hyper.tolist()
    if not all(0 <= value <= 1 for value in scales):
        raise RuntimeError(f"masm::masked_adamw_: mask must hold values in [0, 1], got {scales}")
    live = [row for row in segments.tolist() if scales[row[3]] != 0]
    inverse = 1.0 if grad_scale is None else 1 / grad_scale.item()
    found = mask.new_zeros(1)
    # not finite, or so large that the square would overflow the second moment
    if (found_inf is not None and found_inf.item() != 0) or any(
        not (wide(grads[t].flatten()[begin:end]) * inverse).square().isfinite().all() for t, begin, end, _ in live
    ):
        return stats, found + 1
    for block in {row[3] for row in live}:
        steps[block] += 1
    counts = steps.tolist()
    for t, begin, end, block in live:
        lr, beta1, beta2, eps, weight_decay = rows[t]
        scale, step = scales[block], counts[block]
        p, m, v = (x[t].view(-1)[begin:end] for x in (params, exp_avgs, exp_avg_sqs))
        g = wide(grads[t].flatten()[begin:end]) * inverse
        if step > 1:
            stats[block, 0] += (g.double() * m.double()).sum() / (1 - beta1 ** (step - 1))
            stats[block, 1] += g.double().square().sum()
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = v.sqrt() / (1 - beta2**step) ** 0.5 + eps
        new = wide(p) * (1 - scale * lr * weight_decay) - scale * lr / (1 - beta1**step) * m / denominator
        if penalties and penalties[t].numel():
            new = new - scale * lr * penalties[t].view(-1)[begin:end]
        p.copy_(new)
    return stats, torch.zeros_like(found)
