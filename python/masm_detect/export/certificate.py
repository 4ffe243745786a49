"""The certificate of an export: how far the logits of the exported model are from those of the run, on real crops."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masm_detect.config import DataConfig
from masm_detect.data.decode import read_bytes
from masm_detect.data.frames import FrameDataset, frame_dataset
from masm_detect.data.hf_images import is_key
from masm_detect.data.loading import Batches, in_order
from masm_detect.data.sample import Sample
from masm_detect.data.self_blended import is_self_blended
from masm_detect.hashes import file_sha256
from masm_detect.models.backbone import Backbone
from masm_detect.provenance import package_versions, provenance
from masm_ext.progress import Progress

from .format import ExportError, ExportFormat, Loaded

FILE = "certificate.json"
#: Largest difference of a logit that is accepted. Rounding in float32 moves the logits of a ViT by 1e-6 to 1e-4, a
#: wrong layer, pooling or resizing by 1e-2 and more; 1e-3 lies between them, and moves P(fake) by 2.5e-4 at most.
LIMIT = 1e-3
#: Fewest crops for a certificate.
FEWEST = 256
QUANTILES = (0.5, 0.9, 0.99, 1.0)
_BATCH = 16


@dataclass(frozen=True)
class Crops:
    """The crops of a certificate: images as the run's detector sees them, and where they come from.

    Attributes:
        dataset: the crops, not augmented
        source: what they are, for the reader of the certificate
    """

    dataset: FrameDataset
    source: str

    @property
    def samples(self) -> Sequence[Sample]:
        """One sample for each crop."""
        return self.dataset.samples


def choose_crops(
    samples: Sequence[Sample], backbone: Backbone, data: DataConfig, *, count: int, allow_fewer: bool, source: str
) -> Crops:
    """`count` crops of different files, evenly spread over `samples`.

    Raises:
        ExportError: there are fewer than `count`, or `count` is below `FEWEST`, and `allow_fewer` is not set.
    """
    # a self-blended sample has the path of a real one
    distinct = list({sample.path: sample for sample in samples if not is_self_blended(sample)}.values())
    wanted = max(count, FEWEST) if not allow_fewer else count
    if len(distinct) < wanted and not allow_fewer:
        raise ExportError(
            f"the certificate needs {wanted} crops, but {source} has {len(distinct)}: give more images with --data, or "
            "accept fewer with --allow-fewer"
        )
    places = np.linspace(0, len(distinct) - 1, min(wanted, len(distinct))).round().astype(int)
    return Crops(frame_dataset([distinct[place] for place in places], backbone, data), source)


def logits_on(score: Callable[[Tensor], Tensor], crops: Crops, progress: str | None) -> np.ndarray:
    """Logits [n], float64, of `score`, a function of pixels [B, 3, size, size]; the last batch has another size."""
    batches = Batches(crops.dataset, in_order(len(crops.dataset), _BATCH), torch.device("cpu"), 0)
    found = []
    with Progress(total=len(crops.dataset), unit="img", desc=progress, disable=progress is None) as bar:
        for pixels, _ in batches:
            with torch.inference_mode():
                found.append(score(pixels).double().numpy())
            bar.update(len(pixels))
    return np.concatenate(found)


def file_logits_on(score: Callable[[str], float], crops: Crops, progress: str | None) -> np.ndarray:
    """Logits [n], float64, of `score`, a function of a file; NaN for a crop that is no file of its own (hf:...)."""
    bar = Progress(crops.samples, unit="img", desc=progress, disable=progress is None)
    return np.array([np.nan if is_key(sample.path) else score(sample.path) for sample in bar], np.float64)


def certify(
    format: ExportFormat,
    loaded: Loaded,
    folder: Path,
    reference: np.ndarray,
    crops: Crops,
    limit: float,
    progress: bool,
) -> dict[str, Any]:
    """The certificate of the export in `folder`, as plain values for JSON.

    Args:
        format: of the export.
        loaded: the exported model, loaded again.
        folder: its files, whose hashes are recorded.
        reference: logits [n] of the run's detector on the crops.
        crops: the n crops.
        limit: largest accepted difference of a logit.
        progress: show progress bars.

    Raises:
        ExportError: a difference is above `limit`, or not finite.
    """
    label = "exported" if progress else None
    same = differences(logits_on(loaded.logits, crops, label), reference)
    check_limit(same, limit, "on the same pixels")
    from_files = {}
    for name, score in loaded.file_logits.items():
        logits = file_logits_on(score, crops, f"from files ({name})" if progress else None)
        known = ~np.isnan(logits)
        if known.any():
            from_files[name] = differences(logits[known], reference[known])
            if name in loaded.checked:
                check_limit(from_files[name], limit, f"from the image files, by {name}")
    return {
        "format": "masm-detect certificate",
        "version": 1,
        "compared": f"logits of the run's detector (float32, CPU, subspaces not merged) and of the export, loaded by "
        f"{format.compared}",
        "limit": limit,
        "crops": {
            "count": len(crops.samples),
            "fewest_without_allow_fewer": FEWEST,
            "source": crops.source,
            "per_dataset_and_method": _counts(crops.samples),
            "list_sha256": list_sha256(crops.samples),
            "list": "SHA-256 of the crops' files, one a line in hexadecimal, in the order of the data",
        },
        "logits_of_the_run": {"smallest": float(reference.min()), "largest": float(reference.max())},
        "difference_on_the_same_pixels": same,
        "difference_from_image_files": from_files,
        "not_measured": loaded.not_measured,
        "checked_against_the_limit": ["same pixels", *(name for name in from_files if name in loaded.checked)],
        "files": {str(p.relative_to(folder)): file_sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()},
        "provenance": provenance("cpu") | {"format_packages": package_versions(format.packages)},
    }


def differences(logits: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    """Number, largest value and quantiles of |logits - reference|, both [n]."""
    gap = np.abs(logits - reference)
    return {
        "count": len(gap),
        "largest": float(gap.max()),
        "mean": float(gap.mean()),
        "quantiles": {f"{q:g}": float(np.quantile(gap, q)) for q in QUANTILES},
    }


def check_limit(found: dict[str, Any], limit: float, where: str) -> None:
    """Raise ExportError if the largest difference is above `limit` or NaN."""
    if not found["largest"] <= limit:
        raise ExportError(
            f"the largest difference between the logits of the run and of the export, {where}, is "
            f"{found['largest']:.3g} over {found['count']} crops, above the limit of {limit:g}: nothing was written; "
            "a larger --limit accepts it"
        )


def list_sha256(samples: Sequence[Sample]) -> str:
    """SHA-256 of the list of crops: the SHA-256 of each file's bytes in hexadecimal, one a line."""
    lines = (hashlib.sha256(read_bytes(sample.path)).hexdigest() + "\n" for sample in samples)
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
    return digest.hexdigest()


def _counts(samples: Sequence[Sample]) -> dict[str, int]:
    return dict(sorted(Counter(f"{sample.dataset}: {sample.method}" for sample in samples).items()))
