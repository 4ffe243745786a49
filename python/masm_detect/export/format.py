"""What an export format provides: it writes the model files, and loads them again as their user would."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from masm_detect.config import TrainConfig
from masm_detect.errors import UserError
from masm_detect.models.detector import Detector


class ExportError(UserError, ValueError):
    """A run that cannot be exported; the message names why and what to do."""


@dataclass(frozen=True)
class Run:
    """A finished run to export.

    Attributes:
        folder: the run folder
        config: its settings
        detector: its detector on the CPU, in eval mode; `ExportFormat.write` may change it
        base_hash: `methods.adapters.base_sha256` of its pretrained backbone; None: not computed yet
    """

    folder: Path
    config: TrainConfig
    detector: Detector
    base_hash: str | None = None

    def config_without_paths(self) -> TrainConfig:
        """The settings with the names of the data sets in place of their paths on this machine."""
        names = [_without_folder(path) for path in self.config.data.paths]
        data = replace(self.config.data, paths=names, root=None, prefix_map=None)
        return replace(self.config, data=data, out=Path(self.config.out).name, resume=False)


def _without_folder(path: str) -> str:
    """The name of a data set; a Hugging Face data set of the hub keeps its owner, a folder loses what it is in."""
    kind, name = ("hf:", path[3:]) if path.startswith("hf:") else ("", path)
    if kind and not Path(name).exists() and not Path(name).is_absolute():
        return path
    return kind + Path(name).name


@dataclass(frozen=True)
class Loaded:
    """An exported model, loaded again.

    Attributes:
        logits: pixels [B, 3, size, size], normalised, float32 -> logits [B]
        file_logits: name of a preprocessing -> the logit of an image file, with the export's own decoding and resizing
        checked: the names in `file_logits` that must keep the limit; the others are only recorded
        not_measured: name of a preprocessing -> why it is not in `file_logits`
    """

    logits: Callable[[Tensor], Tensor]
    file_logits: dict[str, Callable[[str], float]]
    checked: tuple[str, ...]
    not_measured: dict[str, str] = field(default_factory=dict)


class ExportFormat:
    """A format of `masm export`.

    Attributes:
        library: name of the library that loads it, for the model card
        usage: key of `usage.USAGE`, for the model card
        compared: what `load` loads the files with, for the certificate
        packages: Python packages that the format adds to the versions in the certificate
    """

    library: ClassVar[str]
    usage: ClassVar[str]
    compared: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()

    def check(self, run: Run) -> None:
        """Raise ExportError if the run cannot have this format; called before any image is read."""

    def needed_import(self, run: Run) -> tuple[str, str] | None:
        """A module that must be imported before the library loads this run, and why; None: none."""
        return None

    def write(self, run: Run, folder: Path) -> None:
        """Write the model files to `folder`."""
        raise NotImplementedError

    def load(self, run: Run, folder: Path) -> Loaded:
        """The model in `folder`, loaded as its user loads it."""
        raise NotImplementedError
