"""Samples in arrays: the same samples as a list of them, in less memory, also in another process."""

from __future__ import annotations

import pickle
import tracemalloc

import numpy as np
import pytest
from masm_detect.data.sample import Sample
from masm_detect.data.samples import Samples

PATHS = [
    "/d/real/v/0.png",
    "key",
    "/",
    "",
    "C:\\frames\\1.png",
    "/d/früh/\udce9.png",
    "hf:set/train/3",
    "/d/real/v/0.png",
]


def few() -> list[Sample]:
    return [
        Sample(
            path, i % 2, f"set{i % 3}", "real" if i % 2 == 0 else f"m{i}", f"set/x/v{i // 2}", ("", "val")[i % 2], group
        )
        for i, (path, group) in enumerate(zip(PATHS, ["", "g", "", "g", "h", "", "ü", ""]))
    ]


def test_they_are_the_samples():
    listed, samples = few(), Samples(few())
    assert len(samples) == len(listed) and list(samples) == listed and samples == listed
    assert [samples[i] for i in range(-8, 8)] == listed * 2
    assert samples[1:6:2] == listed[1:6:2] and samples[::-1] == listed[::-1]
    assert samples[np.int64(3)] == listed[3]
    assert samples.labels.tolist() == [s.label for s in listed]
    assert samples != listed[:-1] and samples != [*listed[:-1], listed[0]]
    assert Samples.of(samples) is samples and Samples.of(iter(listed)) == samples
    for index in (8, -9):
        with pytest.raises(IndexError):
            samples[index]


def test_empty():
    assert len(Samples()) == 0 and list(Samples([])) == [] and Samples()[:3] == []


def test_pickled_for_a_worker():
    assert pickle.loads(pickle.dumps(Samples(few()))) == few()


def frames(count: int, per_video: int):
    """Frames as in DeepfakeBench's folders, made one by one."""
    for index in range(count):
        video, frame = divmod(index, per_video)
        name, kind = (
            f"{video:05d}_{video + 1:05d}",
            ("original_sequences/youtube", "manipulated_sequences/Deepfakes")[video % 2],
        )
        path = f"/datasets/deepfakebench/rgb/FaceForensics++/{kind}/c23/frames/{name}/{frame:03d}.png"
        yield Sample(
            path, video % 2, "FaceForensics++", ("real", "FF-DF")[video % 2], f"FaceForensics++/{kind}/{name}", "train",
            f"FaceForensics++/pair/{name}",
        )  # fmt: skip


def loose(count: int):
    """Images that are not grouped: each one is its own video and its own group."""
    for i in range(count):
        kind = ("real", "fake-gan")[i % 2]
        path = f"/home/somebody/datasets/faces/{kind}/{i:07d}.png"
        yield Sample(path, i % 2, "faces", ("real", "gan")[i % 2], f"faces/{kind}/{i:07d}", "train")


@pytest.mark.parametrize("make, most", [(lambda n: frames(n, 32), 60), (lambda n: frames(n, 4), 100), (loose, 100)])
def test_memory(make, most):
    """Bytes a sample, everything included; a list of `Sample` takes several hundred."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        samples = Samples(make(50_000))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    each = (after - before) / len(samples)
    assert 10 < each <= most, f"{each:.0f} bytes a sample"
