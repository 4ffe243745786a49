"""Samples as tensors for a backbone: decode, augment, resize, normalise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.data import Dataset

from masm_detect.config import DataConfig
from masm_detect.data.decode import decode_image, read_image
from masm_detect.data.sample import Sample
from masm_detect.data.samples import Samples
from masm_detect.data.self_blended import blend_with_itself, is_self_blended
from masm_detect.data.transforms import ImageTransform, transform_image
from masm_detect.models.backbone import Backbone


class FrameDataset(Dataset):
    """Samples as tensors: {"image": float32 [3, size, size], "label": int, "index": int}.

    Augmentation is a function of (seed, epoch, index) only: it does not depend on the number of workers or on the
    order. `images`: images by `Sample.path`, for sets in memory: encoded, or decoded as RGB uint8 [H, W, 3]. An
    unreadable image raises UnreadableImage.
    """

    def __init__(self, samples: Sequence[Sample], transform: ImageTransform, seed: int = 0,
                 images: Mapping[str, np.ndarray | bytes] | None = None):  # fmt: skip
        self.samples, self.transform, self.seed, self.images = Samples.of(samples), transform, seed, images
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.samples)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that the augmentation depends on; call it before the loader starts its workers."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict:
        sample = self.samples[index]
        stored = None if self.images is None else self.images.get(sample.path)
        if stored is None:
            rgb = read_image(sample.path)
        else:
            decoded = isinstance(stored, np.ndarray) and stored.ndim == 3
            rgb = stored if decoded else decode_image(stored, sample.path)
        if is_self_blended(sample):
            rgb = blend_with_itself(rgb, np.random.default_rng([self.seed, self.epoch, index, 1]), sample.path)
        rng = np.random.default_rng([self.seed, self.epoch, index]) if self.transform.augment is not None else None
        image = transform_image(rgb, self.transform, rng, sample.path)
        return {"image": image, "label": sample.label, "index": index}


def frame_dataset(
    samples: Sequence[Sample],
    backbone: Backbone,
    data: DataConfig,
    *,
    augment: bool = False,
    seed: int = 0,
    images: Mapping[str, np.ndarray] | None = None,
) -> FrameDataset:
    """The images of `samples` with the size and pixel statistics of `backbone`.

    Args:
        augment: apply `data.augment`, in training only.
        images: images by path, as in `FrameDataset`, instead of files.
    """
    return FrameDataset(samples, image_transform(backbone, data, augment=augment), seed=seed, images=images)


def image_transform(backbone: Backbone, data: DataConfig, *, augment: bool = False) -> ImageTransform:
    """The transform from an image to the input of `backbone`, as `data` sets it; `augment`: as of `frame_dataset`."""
    return ImageTransform(
        size=backbone.image_size,
        mean=backbone.mean,
        std=backbone.std,
        crop=data.crop,
        augment=data.augment if augment else None,
        normalize_first=data.normalize_first,
    )
