"""Tensors that torch.distributed divides among processes (DTensor)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch.distributed as dist
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor, or the data of a parameter, is a DTensor. By name: the class is slow to import."""
    return type(tensor).__name__ == "DTensor" or type(tensor.data).__name__ == "DTensor"


def whole_tensor(tensor: Tensor) -> Tensor:
    """The values of a tensor. Those of a DTensor are gathered from all processes, so all must call this."""
    return tensor.detach().full_tensor() if is_sharded(tensor) else tensor


def check_not_divided(tensors: Iterable[Tensor], caller: str) -> None:
    """Refuse parameters that learn and are divided among processes: the rows of a block must stay in one process.

    Args:
        tensors: parameters that learn.
        caller: start of the message.

    Raises:
        ValueError: one of them is a DTensor.
    """
    for tensor in tensors:
        if is_sharded(tensor):
            raise ValueError(
                f"{caller}: a trainable parameter of shape {list(tensor.shape)} is a DTensor, divided among processes "
                "by fully_shard or a similar call; call masm_ext.integrations.fsdp.shard(model, mesh) instead, before "
                "accelerate's prepare and before the optimizer is made: it divides the frozen weights only"
            )


def reshard(model: nn.Module) -> bool:
    """Free the gathered weights that FSDP2 keeps after a forward pass without a backward pass, so that parameters are
    in their own dtype again. Returns whether the model holds a DTensor."""
    for module in model.modules():
        if hasattr(module, "set_requires_gradient_sync") and hasattr(module, "reshard"):  # a FSDPModule
            module.reshard()
    return any(is_sharded(p) for p in model.parameters())


def in_first_process(action: Callable[[], None]) -> None:
    """Run ``action`` in process 0 of the default group; the others wait for its end.

    Raises:
        Exception: in process 0 what ``action`` raises; then in the others a RuntimeError.
    """
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            action()
        except Exception as error:  # the others would wait for ever
            failure = error
    outcome = [None if failure is None else f"{type(failure).__name__}: {failure}"]
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[0] is not None:
        raise RuntimeError(f"process 0 failed: {outcome[0]}")
