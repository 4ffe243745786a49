"""The processes of a run that `torchrun` or `accelerate launch` started, through Hugging Face accelerate.

One process trains on the whole batch. Several processes divide each batch: their gradients are averaged by torch's
DistributedDataParallel, so that every process makes the same step as one process with the whole batch, up to the
rounding of the sums. Only the first process writes files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from masm_ext.quantized_weight import held_tensors

from .errors import ConfigError
from .launch import is_launched, is_restarted

Item = TypeVar("Item")

#: How long `wait` waits: the first process alone reads every file once before training.
_PATIENCE = timedelta(hours=12)


class Processes:
    """One process, which needs no communication.

    Attributes:
        rank: number of this process.
        size: number of processes.
    """

    rank = 0
    size = 1

    @property
    def steps_between_flags(self) -> int:
        """Steps after which the processes exchange flags: with many of them, that takes longer than a short step."""
        return max(1, self.size // 8)

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes files."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """The items of this process: every `size`-th one, or all of them if there are fewer items than processes."""
        return items if len(items) < self.size else items[self.rank :: self.size]

    def loss_scale(self, own: int, whole: int) -> float:
        """Factor of the mean loss over the `own` items of this process, for the mean over the `whole` batch."""
        return 1.0

    def parallel(self, model: nn.Module) -> nn.Module:
        """The module to call in training instead of `model`; the gradients of its parameters are averaged."""
        return model

    def without_averaging(self, model: nn.Module) -> AbstractContextManager:
        """Context of a backward pass of `parallel(...)` that only adds to the gradients of this process."""
        return nullcontext()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a scalar over the processes."""
        return value

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process."""
        return flag

    def gather(self, items: list[Item]) -> list[Item]:
        """The items of all processes, ordered by rank."""
        return items

    def features(self, features: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        """Features [B, D] and labels [B] of the shares of all processes; gradients flow to each process's own.

        Args:
            features: [b, D] of the share of this process.
            labels: [b].
            whole: B, the size of the whole batch.
        """
        return features, labels

    def wait(self) -> None:
        """Return when every process has reached this call."""


#: One process, which every function that takes processes has as its default.
ONE_PROCESS = Processes()


class _Several(Processes):
    def __init__(self, device: torch.device) -> None:
        from accelerate import Accelerator
        from accelerate.utils import DistributedType

        if is_restarted() and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
            # on one machine; the machines of a cluster may count their restarts differently
            _connect_again(device)
        threads = torch.get_num_threads()
        self._accelerator = Accelerator(cpu=device.type == "cpu")
        torch.set_num_threads(threads)  # accelerate sets its own number where OMP_NUM_THREADS is not set
        kind = self._accelerator.distributed_type
        if kind not in (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
            raise ConfigError(
                f"the launcher asks for {kind.value}; masm train runs data-parallel only (MULTI_GPU or MULTI_CPU): the "
                "weights that learn are a small part of the model. Use torchrun, or accelerate launch --multi_gpu"
            )
        self._device = device
        self.rank, self.size = self._accelerator.process_index, self._accelerator.num_processes
        # Flags of the host go through the CPU, so that no process waits for its GPU. This group is patient; the other
        # one, which averages gradients, has torch's own timeout, so that the death of a machine is noticed.
        self._host_group = torch.distributed.new_group(backend="gloo", timeout=_PATIENCE)

    def loss_scale(self, own: int, whole: int) -> float:
        return 1.0 if whole < self.size else own * self.size / whole

    def parallel(self, model: nn.Module) -> nn.Module:
        # The frozen weights of converted layers are buffers. They are sent once: machines may decompose them
        # differently in the last bits. DistributedDataParallel would send them in every forward pass, and cannot
        # send weights of 8 bits.
        for buffer in (part for whole in model.buffers() for part in held_tensors(whole)):
            # gloo does not know float8
            plain = buffer.view(torch.uint8) if buffer.is_floating_point() and buffer.element_size() == 1 else buffer
            torch.distributed.broadcast(plain, 0)
        names = [name for name, _ in model.named_buffers()]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return DistributedDataParallel(model, device_ids=[self._device] if self._device.type == "cuda" else None)

    def without_averaging(self, model: nn.Module) -> AbstractContextManager:
        return model.no_sync()

    def mean(self, value: Tensor) -> Tensor:
        total = value.detach().clone()
        torch.distributed.all_reduce(total)
        return total / self.size

    def any(self, flag: bool) -> bool:
        found = torch.tensor(int(flag))
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=self._host_group)
        return bool(found)

    def gather(self, items: list[Item]) -> list[Item]:
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, items, group=self._host_group)
        return [item for part in found for item in part]

    def features(self, features: Tensor, labels: Tensor, whole: int) -> tuple[Tensor, Tensor]:
        from torch.distributed.nn.functional import all_gather

        if whole < self.size:  # every process has the whole batch
            return features, labels
        # Shares may differ by one image, and all_gather takes equal shapes.
        longest = -(-whole // self.size)
        padded = nn.functional.pad(features, (0, 0, 0, longest - len(features)))
        marked = nn.functional.pad(labels, (0, longest - len(labels)), value=-1)
        everywhere = [torch.empty_like(marked) for _ in range(self.size)]
        torch.distributed.all_gather(everywhere, marked)
        whole, known = torch.cat(all_gather(padded)), torch.cat(everywhere)
        return whole[known >= 0], known[known >= 0]

    def wait(self) -> None:
        torch.distributed.barrier(group=self._host_group)


def _connect_again(device: torch.device) -> None:
    """Start the process group of a restarted run under keys of its own.

    torchrun (torch 2.13) uses one store for all attempts, and gloo would find the addresses of dead processes there.
    """
    distributed = torch.distributed
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = distributed.TCPStore(host, port, size, is_master=rank == 0 and not served)
    attempt = distributed.PrefixStore(f"attempt-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    backend = "gloo" if device.type == "cpu" else "cuda:nccl,cpu:gloo"
    distributed.init_process_group(backend, store=attempt, rank=rank, world_size=size)


@contextmanager
def processes(device: torch.device) -> Iterator[Processes]:
    """The processes of this run. Under a launcher: joins its group, and leaves it at exit, except after an error.

    Args:
        device: where this process computes.

    Raises:
        ConfigError: accelerate is not installed, or the launcher asks for more than data parallelism.
    """
    if not is_launched():
        yield ONE_PROCESS
        return
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ConfigError("several processes need accelerate: pip install accelerate") from error
    yield _Several(device)
    # Not after an error: the other processes may wait in a collective call, and the launcher ends them.
    torch.distributed.destroy_process_group()
