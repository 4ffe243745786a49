"""Cells: which are chosen by which names."""

from __future__ import annotations

import pytest
from masm_detect.distortions.registry import DISTORTIONS, DistortionError, choose_cells


def names(*arguments, **options):
    return [cell.name for cell in choose_cells(*arguments, **options)]


def test_all_cells():
    every = names()
    assert every[0] == "clean" and len(every) == len(set(every)) == 1 + sum(len(d.levels) for d in DISTORTIONS.values())
    assert sum(name.split(":")[0] in ("saturation", "contrast", "blocks", "noise", "blur", "pixelate", "vc")
               for name in every) == 35  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("jpeg:50", ["jpeg:50"]),
        ("resize, jpeg:10,jpeg:90", ["jpeg:90", "jpeg:10", "resize:75", "resize:50", "resize:25"]),
        ("codecs", ["h264:23", "h264:30", "h264:35", "h264:40", "hevc:28", "hevc:35"]),
        ("hevc:35,codecs,hevc", ["h264:23", "h264:30", "h264:35", "h264:40", "hevc:28", "hevc:35"]),
    ],
)
def test_chosen_cells(given, expected):
    assert names(given) == ["clean", *expected]


def test_quick_takes_the_middle_level():
    quick = names(quick=True)
    assert len(quick) == 1 + len(DISTORTIONS) and {"blur:3", "jpeg:50", "resize:50", "vc:3"} <= set(quick)
    assert names("jpeg:90,blur", quick=True) == ["clean", "blur:3", "jpeg:90"]


@pytest.mark.parametrize("given", ["jpg", "jpeg:55", "", "jpeg:", "pictures:50", "jpeg,,blur"])
def test_unknown_names(given):
    with pytest.raises(DistortionError):
        choose_cells(given)
