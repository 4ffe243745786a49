"""A detector and samples in, scores out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from masm_detect.data.frames import FrameDataset
from masm_detect.data.loading import Batches, in_order
from masm_detect.data.sample import DatasetError
from masm_detect.distributed import ONE_PROCESS, Processes
from masm_detect.models.detector import Detector
from masm_detect.runtime import autocast
from masm_ext.progress import Progress


@torch.inference_mode()
def predict(
    detector: Detector,
    dataset: FrameDataset,
    *,
    batch_size: int = 32,
    precision: str = "fp32",
    workers: int | None = None,
    progress: str | None = None,
    ranks: Processes = ONE_PROCESS,
) -> Tensor:
    """Logits [n] of the n samples of a data set, float32 on the CPU, in its order.

    Args:
        detector: the model; it is set to eval mode and stays on its device.
        dataset: the samples, with the transform of the detector's backbone (`data.frames.frame_dataset`).
        batch_size: images in a batch.
        precision: "bf16" or "fp16" (autocast), or "fp32".
        workers: processes that read the images, as in `data.loading.Batches`.
        progress: label of a progress bar; None: no bar.
        ranks: the processes that divide the batches; each returns all logits, those of one process bit for bit.

    Returns:
        Logits, float32 [n]: above 0 is called fake.

    Raises:
        DatasetError: the data set is empty.
    """
    if not len(dataset):
        raise DatasetError("there are no images to score")
    batches = in_order(len(dataset), batch_size)
    numbers = range(ranks.rank, len(batches), ranks.size)
    own = [batches[number] for number in numbers]
    outputs = [z for z, _ in _outputs(detector, dataset, own, precision, workers, progress)]
    if ranks.size == 1:
        return torch.cat(outputs).cpu()  # one copy to the CPU: a copy per batch would wait for the GPU each time
    found = dict(ranks.gather([(number, z.tolist()) for number, z in zip(numbers, outputs)]))
    return torch.tensor([logit for number in range(len(batches)) for logit in found[number]], dtype=torch.float32)


@torch.inference_mode()
def predict_features(
    detector: Detector,
    dataset: FrameDataset,
    *,
    batch_size: int = 32,
    precision: str = "fp32",
    workers: int | None = None,
    progress: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Logits [n] and features [n, feature_dim], float32 on the CPU.

    Args:
        detector: as of `predict`.
        dataset: as of `predict`.
        batch_size: as of `predict`.
        precision: as of `predict`.
        workers: as of `predict`.
        progress: as of `predict`.

    Raises:
        DatasetError: the data set is empty.
    """
    if not len(dataset):
        raise DatasetError("there are no images to score")
    batches = in_order(len(dataset), batch_size)
    outputs = list(_outputs(detector, dataset, batches, precision, workers, progress))
    return torch.cat([z for z, _ in outputs]).cpu(), torch.cat([f for _, f in outputs]).cpu()


def _outputs(
    detector: Detector,
    dataset: FrameDataset,
    batches: Sequence[range],
    precision: str,
    workers: int | None,
    progress: str | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits and features of each batch, on the device."""
    device = next(detector.parameters()).device
    detector.eval()
    with Progress(total=sum(map(len, batches)), unit="img", desc=progress, disable=progress is None) as bar:
        for images, _ in Batches(dataset, batches, device, workers):
            with autocast(precision, device):
                logits, features = detector(images, return_features=True)
            yield logits.float(), features.float()
            bar.update(len(images))


def score_samples(detector: Detector, dataset: FrameDataset, **options: Any) -> np.ndarray:
    """P(fake) of each sample: the sigmoid of `predict`.

    Args:
        detector: the model.
        dataset: the n samples.
        options: as of `predict`.

    Returns:
        float64 [n], in [0, 1].
    """
    return torch.sigmoid(predict(detector, dataset, **options).double()).numpy()
