"""`DetectorImageProcessor`: an image becomes the input of a detector as in training, with the code of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from transformers.feature_extraction_utils import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor

from masm_detect.data.transforms import ImageTransform, transform_image

from .configuration import DetectorConfig, HubError


class DetectorImageProcessor(BaseImageProcessor):
    """Recompresses (if the run did), resizes or crops, and normalises images for a detector.

    Args:
        size: {"height": side, "width": side} of the input in pixels.
        image_mean: pixel mean per RGB channel, for pixels in [0, 1].
        image_std: pixel standard deviation, likewise.
        crop: "resize": the whole image, bicubic with antialiasing (Pillow's); "center": the middle, not resampled.
        normalize_first: [side in pixels, JPEG quality]: every image is first resized and recompressed; None: off.
        **kwargs: as of `transformers.BaseImageProcessor`.
    """

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        size: dict[str, int] | None = None,
        image_mean: Sequence[float] = (0.485, 0.456, 0.406),
        image_std: Sequence[float] = (0.229, 0.224, 0.225),
        crop: str = "resize",
        normalize_first: Sequence[int] | None = None,
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.size = {"height": 224, "width": 224} if size is None else dict(size)
        self.image_mean, self.image_std = list(image_mean), list(image_std)
        self.crop = crop
        self.normalize_first = None if normalize_first is None else list(normalize_first)

    @classmethod
    def for_model(cls, config: DetectorConfig) -> DetectorImageProcessor:
        """The image processor of a detector.

        Args:
            config: the configuration of the detector.
        """
        backbone = config.backbone
        return cls(
            size={"height": backbone["image_size"], "width": backbone["image_size"]},
            image_mean=backbone["mean"],
            image_std=backbone["std"],
            crop=config.crop,
            normalize_first=config.normalize_first,
        )

    def preprocess(self, images: Any, return_tensors: str | None = "pt", **kwargs: Any) -> BatchFeature:
        """One image or a list of them -> `pixel_values`, float32 [B, 3, side, side].

        Args:
            images: PIL images; or uint8 arrays or tensors, [H, W, 3], [3, H, W] or [H, W].
            return_tensors: "pt" or "np"; None: "pt".
            **kwargs: none: the preprocessing is that of the training and cannot be changed in a call.

        Raises:
            HubError: an image of another kind, or an argument.
            TransformError: an image smaller than the centre crop.
        """
        if kwargs:
            raise HubError(
                f"{', '.join(sorted(kwargs))}: the preprocessing is that of the training; load the image processor "
                "with other settings to change it"
            )
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        transform = self._transform()
        pixels = [transform_image(_rgb(image), transform, name=f"image {at}") for at, image in enumerate(images)]
        return BatchFeature({"pixel_values": torch.stack(pixels)}, tensor_type=return_tensors or "pt")

    def _transform(self) -> ImageTransform:
        if self.size["height"] != self.size["width"]:
            raise HubError(f"size is {self.size}: the input of a detector is a square")
        return ImageTransform(
            size=self.size["height"],
            mean=tuple(self.image_mean),
            std=tuple(self.image_std),
            crop=self.crop,
            normalize_first=None if self.normalize_first is None else tuple(self.normalize_first),
        )


def _rgb(image: Any) -> np.ndarray:
    """An image as RGB uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    array = image.numpy(force=True) if isinstance(image, torch.Tensor) else image
    if not isinstance(array, np.ndarray) or array.dtype != np.uint8 or array.ndim not in (2, 3):
        what = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else type(image).__name__
        raise HubError(f"an image is {what}: give PIL images, or uint8 arrays [H, W, 3]")
    if array.ndim == 2:
        return np.repeat(array[:, :, None], 3, axis=2)
    if array.shape[-1] != 3:
        array = np.moveaxis(array, 0, -1)
    if array.shape[-1] != 3:
        raise HubError(f"an image has the shape {list(np.shape(image))}: it needs 3 channels, RGB")
    return np.ascontiguousarray(array)
