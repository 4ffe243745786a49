"""The scores of a part of the material in one cell, the journal that keeps them, and the network behind them.

Material is scored part by part, every cell of a part before the next part: each file is decoded once, and an
interrupted command loses one cell of one part. A part is a block of ready crops, or one raw file.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masm_detect.casework.detector import TrainedDetector
from masm_detect.journal import Journal
from masm_detect.runtime import autocast, resolve_precision

JOURNAL = "unfinished.jsonl"


@dataclass
class PartScores:
    """What became of a part in one cell.

    Attributes:
        part: its number
        cell: name of the cell
        wanted: images that were to be scored: places in the list of samples, or numbers of frames of a raw file
        rows: (image, logit, seconds, track, box) of each scored crop
        lost: (image, reason) of the images without a score
        skipped: (image, reason) of the images that the distortion does not apply to; they do not count as wanted
        unchanged: scored images in which the distortion changed no pixel
        reason: why the whole file was lost, or None
    """

    part: int
    cell: str
    wanted: list[int] = field(default_factory=list)
    rows: list[tuple[int, float, float | None, int | None, list[float] | None]] = field(default_factory=list)
    lost: list[tuple[int, str]] = field(default_factory=list)
    skipped: list[tuple[int, str]] = field(default_factory=list)
    unchanged: list[int] = field(default_factory=list)
    reason: str | None = None


class PartJournal(Journal):
    """The journal of an examination.

    Attributes:
        done: (part, name of the cell) -> its scores
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Read `path`, or start it; arguments and errors as of `Journal`."""
        super().__init__(path, settings, "examination", overwrite=overwrite)
        self.done = {(entry["part"], entry["cell"]): PartScores(**entry) for entry in self.entries}

    def add_scores(self, scores: PartScores) -> None:
        """Keep the scores of a part in a cell."""
        self.done[scores.part, scores.cell] = scores
        self.add(asdict(scores))


class Network:
    """The network of a run: tensors in, logits out.

    Attributes:
        trained: the run
        precision: bf16, fp16 or fp32
        batch_size: images in a batch
    """

    def __init__(self, trained: TrainedDetector, precision: str, batch_size: int) -> None:
        self.trained, self.batch_size = trained, batch_size
        self.precision = resolve_precision(precision, trained.device)

    @torch.inference_mode()
    def logits(self, images: Iterable[Tensor]) -> np.ndarray:
        """Logits of n images float32 [3, size, size], float64 [n]; in batches as `masm eval` forms them."""
        found, batch = [np.empty(0)], []
        for image in images:
            batch.append(image)
            if len(batch) == self.batch_size:
                found.append(self._scored(batch))
                batch = []
        if batch:
            found.append(self._scored(batch))
        return np.concatenate(found)

    def _scored(self, batch: list[Tensor]) -> np.ndarray:
        with autocast(self.precision, self.trained.device):
            logits, _ = self.trained.detector(torch.stack(batch).to(self.trained.device), return_features=True)
        return logits.float().cpu().double().numpy()
