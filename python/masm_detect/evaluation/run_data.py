"""The images on which a finished run is examined: its own validation data, or other data sets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from masm_detect.config import DataConfig
from masm_detect.data.checks import check_samples
from masm_detect.data.sample import Sample
from masm_detect.data.sources import load_samples, read_splits


def run_samples(
    config: DataConfig,
    data: Sequence[str] | None,
    split: str | None = None,
    *,
    need_both_classes: bool = True,
    **reading: Any,
) -> tuple[Sequence[Sample], str]:
    """The samples, and what they are in a few words.

    Args:
        config: the data settings of the run.
        data: data sets as in `masm eval`; None or empty: the validation data of the run, read with its own settings.
        split: the split of `data` to read; None: all.
        need_both_classes: refuse `data` with real or fake images only.
        reading: how `data` is read, as of `data.sources.load_samples`.

    Raises:
        ConfigError, DatasetError: the data cannot be read.
    """
    if not data:
        return read_splits(config)["val"], "the validation data of the run"
    samples = load_samples(data, splits=None if split is None else [split], **reading)
    check_samples(samples, need_both_classes)
    return samples, "the data given with --data" + (f", split {split}" if split else "")
