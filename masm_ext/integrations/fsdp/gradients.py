"""Averages the gradients of replicated parameters over the processes of a mesh, at the end of a backward pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh


class GradientAverage:
    """Replaces ``.grad`` of the parameters by its mean over the processes when a backward pass ends.

    Gradients of several backward passes add up, as under DistributedDataParallel: after passes with ``enabled`` False
    and a last one with True, ``.grad`` is the mean of the sums. A parameter that has a gradient in some processes only
    counts as zero in the others.

    Args:
        parameters: the same ones in the same order in every process.
        mesh: the processes, of any number of dimensions.

    Attributes:
        enabled: False: a backward pass only adds to the gradients of this process.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], mesh: DeviceMesh) -> None:
        self.enabled = True
        self._parameters = list(parameters)
        self._mesh = mesh
        self._pass = -1  # the backward pass whose end is awaited
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self._await_end)

    def _await_end(self, _: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if self.enabled and current != self._pass:  # by number: a pass that raised has no end
            self._pass = current
            torch.autograd.Variable._execution_engine.queue_callback(self.average)

    @torch.no_grad()
    def average(self) -> None:
        """Average the gradients now. Every process must call it."""
        for dtype in {p.dtype: None for p in self._parameters}:
            self._average([p for p in self._parameters if p.dtype == dtype])

    def _average(self, parameters: list[nn.Parameter]) -> None:
        # One message of the same length in every process; its tail counts the processes with a gradient.
        grads = [p.grad for p in parameters]
        present = torch.tensor([g is not None for g in grads], dtype=parameters[0].dtype, device=parameters[0].device)
        pieces = [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(parameters, grads)]
        total = torch.cat([*pieces, present])
        for dimension in range(self._mesh.ndim):
            dist.all_reduce(total, group=self._mesh.get_group(dimension))
        *means, counts = total.split([p.numel() for p in parameters] + [len(parameters)])
        # Reading the counts waits for the device; a process in which every parameter has a gradient need not.
        elsewhere = counts.tolist() if any(g is None for g in grads) else [1.0] * len(grads)
        for p, grad, mean, count in zip(parameters, grads, means, elsewhere):
            mean = (mean / self._mesh.size()).view_as(p)
            if grad is not None:
                grad.copy_(mean)
            elif count:
                p.grad = mean
