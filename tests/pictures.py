"""Pictures that resemble photographs to a perceptual hash: shapes of every size, which depend on the seed alone."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from PIL import Image


def picture(seed: int, side: int = 192) -> Image.Image:
    """An RGB picture of side x side pixels."""
    random = np.random.default_rng(seed)
    scales = [random.normal(0, 200 / cells, (cells, cells, 3)).astype(np.float32) for cells in (4, 8, 16, 32, 64)]
    total = 128 + sum(cv2.resize(scale, (192, 192), interpolation=cv2.INTER_CUBIC) for scale in scales)
    image = Image.fromarray(total.clip(0, 255).astype(np.uint8))
    return image if side == 192 else image.resize((side, side), Image.Resampling.BICUBIC)


def write_picture(path: Path, seed: int, side: int = 96, quality: int = 95) -> Path:
    """The picture of `seed` as a file: JPEG, or PNG if the name says so. Its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, side).save(path, **({"quality": quality} if path.suffix == ".jpg" else {}))
    return path
