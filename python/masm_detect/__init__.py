"""Training and evaluation of deepfake detectors on frozen vision transformers: the command `masm`.

Data flows one way: image files -> `data.sample.Sample` -> `data.frames.FrameDataset` -> `models.detector.Detector`
-> logits -> `evaluation.metrics` -> `results`. Label 1 means fake, and a score is P(fake).

`load_detector(run)` gives the trained detector of a run folder; its `predict(paths)` scores pictures and videos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from masm_detect.casework.detector import load_detector as load_detector

__all__ = ["load_detector"]


def __getattr__(name: str) -> Any:
    # not at the top: the command line must start without the import of torch
    if name == "load_detector":
        from masm_detect.casework.detector import load_detector

        return load_detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
