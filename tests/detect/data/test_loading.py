"""Batches on a device: what comes out is the same for any number of workers, and waiting is measured."""

from __future__ import annotations

import copyreg
import os
import time
from multiprocessing import active_children

import cv2
import numpy as np
import pytest
import torch
from masm_detect.config import AugmentConfig, DataConfig
from masm_detect.data import loading
from masm_detect.data.decode import UnreadableImage
from masm_detect.data.folders import read_folder
from masm_detect.data.frames import FrameDataset, frame_dataset
from masm_detect.data.loading import Batches, WorkerDied, in_order, worker_count
from masm_detect.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture
def dataset(tiny_data, tiny_detector) -> FrameDataset:
    augment = AugmentConfig(flip=0.5, noise=0.5, blur=0.5, jpeg=0.5, downscale=0.5)
    return frame_dataset(read_folder(tiny_data), tiny_detector().backbone, DataConfig(augment=augment), augment=True)


class Plain:
    """A data set of `size` samples; `get(index)` gives the label."""

    def __init__(self, size, get):
        self.size, self.get = size, get

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"image": torch.full((3, 2, 2), float(index)), "label": self.get(index), "index": index}


def test_how_many_workers(monkeypatch):
    cuda = torch.device("cuda")
    for cores, expected in ((1, 0), (2, 1), (8, 7), (17, 16), (64, 16)):
        monkeypatch.setattr(loading.joblib, "cpu_count", lambda cores=cores: cores)
        assert worker_count(None, cuda) == expected
        assert worker_count(None, CPU) == 0
        assert worker_count(3, cuda) == worker_count(3, CPU) == 3
        assert worker_count(0, cuda) == 0


def test_no_more_workers_than_batches():
    assert Batches(Plain(5, int), in_order(5, 2), CPU, workers=9).workers == 3
    assert list(Batches(Plain(0, int), [], CPU, workers=2)) == []


def test_batches_do_not_depend_on_the_workers(dataset):
    indices = [[3, 1, 20], [0, 22, 7], [5]]
    before = torch.get_rng_state()
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        one, other = (list(Batches(dataset, indices, CPU, workers)) for workers in (0, 2))
        assert [len(labels) for _, labels in one] == [3, 3, 1]
        for left, right in zip(one, other, strict=True):
            assert torch.equal(left[0], right[0]) and torch.equal(left[1], right[1])
        for batch, (images, labels) in zip(indices, one):
            assert labels.tolist() == [dataset.samples[i].label for i in batch]
            assert all(torch.equal(image, dataset[i]["image"]) for i, image in zip(batch, images))
    assert torch.equal(torch.get_rng_state(), before)  # dropout draws from it


def test_in_order():
    assert [list(batch) for batch in in_order(5, 2)] == [[0, 1], [2, 3], [4]]
    assert in_order(0, 2) == []


def blur(_) -> int:
    cv2.GaussianBlur(np.zeros((512, 512, 3), np.uint8), (0, 0), 2.0)
    return cv2.getNumThreads()


def test_opencv_has_no_threads_of_its_own_in_a_worker():
    before = cv2.getNumThreads()
    try:
        cv2.setNumThreads(4)
        assert blur(0) == 4  # the pool of this process is up, should the workers be forked
        [(_, alone)] = Batches(Plain(4, blur), in_order(4, 4), CPU, workers=0)
        assert alone.tolist() == [4] * 4
        [(_, worker)] = Batches(Plain(4, blur), in_order(4, 4), CPU, workers=1)
        assert worker.tolist() == [1] * 4  # what OpenCV answers for 0
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_as_without_workers(dataset, tiny_data, workers):
    (tiny_data / "real" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(UnreadableImage, match=r"03\.png is truncated") as caught:
        list(Batches(dataset, in_order(len(dataset), 5), CPU, workers))
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("with_tracebacks", [False, True])
def test_a_damaged_image_leaves_no_process_behind(dataset, tiny_data, with_tracebacks):
    """Not even while the exception, and with it the frame that read the images, is kept; nor if tracebacks are pickled,
    as Dask does it."""
    if with_tracebacks:
        pytest.importorskip("tblib.pickling_support", reason="needs the extra masm_ext[dask]").install(UnreadableImage)
    (tiny_data / "real" / "03.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    before = set(active_children())
    try:
        with pytest.raises(UnreadableImage) as caught:
            list(Batches(dataset, in_order(len(dataset), 2), CPU, workers=2))
        assert not set(active_children()) - before and caught.value is not None
    finally:
        copyreg.dispatch_table.pop(UnreadableImage, None)


def die(index: int) -> int:
    os._exit(3)


def no_memory(index: int) -> int:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize(("happens", "reason"), [(die, "exited unexpectedly"), (no_memory, "No space left on device")])
def test_a_worker_that_cannot_go_on_is_a_users_error(happens, reason):
    with pytest.raises(WorkerDied, match=f"(?s){reason}.*shm-size.*--runtime.workers") as caught:
        list(Batches(Plain(4, happens), in_order(4, 2), CPU, workers=1))
    assert isinstance(caught.value, UserError) and "Traceback" not in str(caught.value)


def wrong(index: int) -> int:
    raise RuntimeError("a bug")


def test_other_errors_are_what_they_are():
    with pytest.raises(RuntimeError, match=r"^unable to allocate"):
        list(Batches(Plain(4, no_memory), in_order(4, 2), CPU, workers=0))
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*a bug") as caught:
        list(Batches(Plain(4, wrong), in_order(4, 2), CPU, workers=1))
    assert not isinstance(caught.value, UserError)


def slow(index: int) -> int:
    time.sleep(0.01)
    return index


@pytest.mark.parametrize("workers", [0, 1])
def test_waiting_is_noted(workers):
    batches = Batches(Plain(8, slow), in_order(8, 2), CPU, workers)
    noted = []
    for _ in batches:
        noted.append(batches.waited)
    assert noted == sorted(noted) and noted[0] > 0
    assert batches.waited >= 0.08 if workers == 0 else batches.waited > 0


def test_time_of_the_consumer_is_not_waiting():
    batches = Batches(Plain(4, int), in_order(4, 1), CPU)
    started = time.perf_counter()
    for _ in batches:
        time.sleep(0.05)
    assert batches.waited <= time.perf_counter() - started - 0.19


def test_on_cuda_memory_is_pinned_and_copies_do_not_block(monkeypatch):
    options_given, copies = {}, []

    class OnTheHost:
        def to(self, device, non_blocking=False):
            copies.append((device, non_blocking))
            return "on the device"

    def loader(_, **options):
        options_given.update(options)
        return [[OnTheHost(), OnTheHost()]]

    monkeypatch.setattr(loading, "DataLoader", loader)
    device = torch.device("cuda", 1)
    assert list(Batches(Plain(2, int), in_order(2, 2), device)) == [("on the device", "on the device")]
    assert options_given["pin_memory"] is True and copies == [(device, True)] * 2
    list(Batches(Plain(2, int), in_order(2, 2), CPU))
    assert options_given["pin_memory"] is False
