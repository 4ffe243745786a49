"""Batches of a data set on a device: worker processes, pinned memory, asynchronous copies."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import cv2
import joblib
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info

from masm_detect.data.frames import FrameDataset
from masm_detect.errors import UserError
from masm_detect.launch import local_size

#: Largest default number of worker processes; more of them mostly cost memory.
MOST_WORKERS = 16


def worker_count(workers: int | None, device: torch.device) -> int:
    """`workers`, or its default if None.

    The default is 0 on the CPU, whose cores train, and on CUDA the usable cores less one, at most `MOST_WORKERS`. The
    processes of a launcher share the cores of their machine.
    """
    if workers is not None:
        return workers
    if device.type != "cuda":
        return 0
    cores = joblib.cpu_count() // local_size()  # respects affinity and the limits of containers
    return min(MOST_WORKERS, max(0, cores - 1))


class WorkerDied(UserError, RuntimeError):
    """A worker process died, or had no shared memory for its batch."""


class Batches:
    """The batches of `dataset` that `indices` lists, in that order, as (images [B, 3, H, W], labels [B]) on `device`.

    The batches do not depend on `workers` (None: see `worker_count`). `waited` is the time in seconds for which the
    consumer was blocked, start and end of the workers included. A GPU may still have had work meanwhile, so there it is
    an upper limit of the cost of the data.
    """

    def __init__(
        self, dataset: FrameDataset, indices: Sequence[Sequence[int]], device: torch.device, workers: int | None = None
    ) -> None:
        self.dataset, self.indices, self.device = dataset, indices, device
        self.workers = min(worker_count(workers, device), len(indices))
        self.waited = 0.0

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        started = time.perf_counter()
        loader = iter(
            DataLoader(
                _ErrorsAsValues(self.dataset) if self.workers else self.dataset,
                batch_sampler=self.indices,
                num_workers=self.workers,
                collate_fn=_collate,
                pin_memory=self.device.type == "cuda",
                worker_init_fn=_start_worker,
                # A separate generator: the loader would draw from the global one, which dropout uses, and would draw
                # again in a resumed epoch.
                generator=torch.Generator(),
            )
        )
        try:
            while True:
                batch = self._next(loader)
                self.waited += time.perf_counter() - started
                if batch is None:
                    return
                if isinstance(batch, UserError):
                    raise _without_frames(batch)
                yield tuple(t.to(self.device, non_blocking=True) for t in batch)
                started = time.perf_counter()
        finally:
            del loader  # ends the workers now, though a traceback may keep this frame

    def _next(self, loader: Iterator[Any]) -> Any:
        try:
            return next(loader, None)
        except RuntimeError as error:
            # a dead process, or (with its traceback as text) torch's error on sharing a batch
            if not (self.workers and (str(error).startswith("DataLoader worker") or "shared memory" in str(error))):
                raise
            raise WorkerDied(
                f"the {self.workers} processes that read images failed ({_last_line(error)}), perhaps because there "
                "was too little memory or shared memory (/dev/shm; docker run --shm-size): set fewer processes with "
                "--runtime.workers, or 0"
            ) from error


def in_order(size: int, batch_size: int) -> list[range]:
    """The indices 0 to `size` - 1 in batches."""
    return [range(start, min(start + batch_size, size)) for start in range(0, size, batch_size)]


class _ErrorsAsValues(Dataset):
    """A data set in a worker. It returns a UserError as a value: exceptions of a worker arrive as text."""

    def __init__(self, dataset: FrameDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: Sequence[int]) -> list[dict] | UserError:
        try:
            return [self.dataset[index] for index in indices]
        except UserError as error:
            return error


def _collate(items: list[dict] | UserError) -> Any:
    if isinstance(items, UserError):
        return items
    labels = torch.tensor([item["label"] for item in items])
    if get_worker_info() is not None:
        return default_collate([item["image"] for item in items]), labels  # straight into shared memory
    images = torch.empty(len(items), *items[0]["image"].shape)
    for row, item in zip(images.numpy(), items):  # by numpy: as in `transform_image`, torch's threads would wait
        row[...] = item["image"].numpy()
    return images, labels


def _without_frames(error: UserError) -> UserError:
    """An error of a worker, without frames: some packages (tblib) pickle tracebacks, and unpickled here they hold the
    loader, whose workers would then not end.
    """
    part: BaseException | None = error
    while part is not None:
        part.__traceback__ = None
        part = part.__cause__ or part.__context__
    return error


def _start_worker(_: int) -> None:
    # The training process handles Ctrl-C and SIGTERM, which launchers send to all its processes, and ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # OpenCV's own threads would compete with the workers, and its pool does not survive a fork. 0, not 1: 1 waits for
    # the end of threads that the fork did not copy.
    cv2.setNumThreads(0)


def _last_line(error: Exception) -> str:
    """The message of a worker's error, without the traceback that precedes it."""
    return str(error).strip().splitlines()[-1]
