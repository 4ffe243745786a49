"""The scores of a part of the material in one cell, the journal that keeps them, and the network behind them.

Material is scored part by part, every cell of a part before the next part: each file is decoded once, and an
interrupted command loses one cell of one part. A part is a block of ready crops, or one raw file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor

from masm_detect.casework.detector import TrainedDetector
from masm_detect.config import ConfigError
from masm_detect.results import write_text
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


class Journal:
    """The finished parts of an interrupted command, and a file to which new ones are added.

    Attributes:
        done: (part, name of the cell) -> its scores
    """

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
        """Read `path`, or start it.

        Raises:
            ConfigError: it has other settings.
        """
        self.path, self.done = path, {}
        entries = list(_whole_lines(path)) if path.is_file() else []
        settings = json.loads(json.dumps(settings))
        if overwrite and entries and entries[0] != settings:
            entries = []  # with the same settings, an interrupted command that replaces results goes on
        if entries and entries[0] != settings:
            other = [name for name in settings if entries[0].get(name) != settings[name]]
            raise ConfigError(
                f"{path.parent} holds an unfinished examination with other settings ({', '.join(other) or 'format'}): "
                "give another --out, or --overwrite to start again"
            )
        for entry in entries[1:]:
            self.done[entry["part"], entry["cell"]] = PartScores(**entry)
        path.parent.mkdir(parents=True, exist_ok=True)
        # the last line may have been cut off
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in (entries or [settings])))
        self._file: TextIO = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by the context)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def add(self, scores: PartScores) -> None:
        """Keep the scores of a part in a cell."""
        self.done[scores.part, scores.cell] = scores
        self._file.write(json.dumps(asdict(scores)) + "\n")
        self._file.flush()


def _whole_lines(path: Path) -> Iterator[Any]:
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # the program was killed while it wrote
            return


class Network:
    """The network of a run: tensors in, logits out.

    Attributes:
        trained: the run
        precision: bf16 or fp32
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
