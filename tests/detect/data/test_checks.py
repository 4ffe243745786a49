"""What makes a data set unusable."""

from __future__ import annotations

import pytest
from masm_detect.data.checks import check_samples
from masm_detect.data.sample import DatasetError, Sample


def sample(path="a", label=0, split="", group="", video="d/real/v"):
    return Sample(path, label, "d", "m" if label else "real", video, split, group)


def test_checks():
    with pytest.raises(DatasetError, match="empty"):
        check_samples([])
    with pytest.raises(DatasetError, match="all 1 samples are fake"):
        check_samples([sample(label=1)])
    check_samples([sample(label=1)], need_both_classes=False)
    with pytest.raises(DatasetError, match="appears twice"):
        check_samples([sample(), sample(), sample("b", label=1)])
    with pytest.raises(DatasetError, match=r"a is real in 'd/real/v' and fake in 'd/real/v'"):
        check_samples([sample(), sample(label=1)])
    with pytest.raises(DatasetError, match=r"'train' \(as 'd/real/v'\) and 'val'.*data\.splits"):
        check_samples([sample(split="train", group="g"), sample(split="val", group="h"), sample("b", label=1)])
    with pytest.raises(DatasetError, match=r"'g' in \['test', 'train'\]"):
        check_samples([sample("a", 0, "train", "g"), sample("b", 1, "test", "g")])
    with pytest.raises(DatasetError, match="label must be 0"):
        sample(label=2)
