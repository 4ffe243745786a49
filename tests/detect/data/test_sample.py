"""Frames of a video are limited evenly."""

from __future__ import annotations

import pytest
from masm_detect.data.sample import Sample, limit_frames


def sample(path="a", label=0, split="", group="", video="d/real/v"):
    return Sample(path, label, "d", "m" if label else "real", video, split, group)


def test_limit_frames():
    samples = [sample(str(i)) for i in range(10)] + [sample(str(i), video="d/real/w") for i in range(2)]
    kept = limit_frames(samples, 4)
    assert [s.path for s in kept] == ["0", "3", "6", "9", "0", "1"]
    with pytest.raises(ValueError, match="at least 1"):
        limit_frames(samples, 0)
    assert limit_frames(samples, None) == samples
    # A video in two splits is limited in each.
    two = [sample(f"{split}{i}", split=split) for split in ("train", "val") for i in range(5)]
    assert [s.path for s in limit_frames(two, 2)] == ["train0", "train4", "val0", "val4"]
