"""Samples as tensors: augmentation by seed, epoch and index; worker processes."""

from __future__ import annotations

import cv2
import numpy as np
import torch
from masm_detect.config import AugmentConfig
from masm_detect.data.decode import png_bytes
from masm_detect.data.frames import FrameDataset
from masm_detect.data.sample import Sample
from masm_detect.data.transforms import ImageTransform

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def picture(h=40, w=60, seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (0, 0), 2)


def sample(path, label=0):
    return Sample(str(path), label, "d", "m" if label else "real", "d/x/v")


def everything():
    return AugmentConfig(flip=0.5, jpeg=0.5, blur=0.5, brightness_contrast=0.5, noise=0.5, downscale=0.5)


def test_augmentation_depends_on_seed_epoch_and_index_only():
    images = {str(i): png_bytes(picture(seed=i)) for i in range(6)}
    samples = [sample(i) for i in images]

    def draw(seed, epoch, order):
        dataset = FrameDataset(samples, ImageTransform(32, MEAN, STD, augment=everything()), seed, images)
        dataset.set_epoch(epoch)
        return {i: dataset[i]["image"] for i in order}

    a, b = draw(0, 3, range(6)), draw(0, 3, reversed(range(6)))
    assert all(torch.equal(a[i], b[i]) for i in a)
    assert not all(torch.equal(a[i], v) for i, v in draw(0, 4, range(6)).items())
    assert not all(torch.equal(a[i], v) for i, v in draw(1, 3, range(6)).items())


def test_loader_with_workers():
    images = {str(i): png_bytes(picture(seed=i)) for i in range(4)}
    dataset = FrameDataset([sample(i, int(i) % 2) for i in images], ImageTransform(16, MEAN, STD), images=images)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=4, num_workers=1)))
    assert batch["image"].shape == (4, 3, 16, 16)
    assert batch["label"].tolist() == [0, 1, 0, 1] and batch["index"].tolist() == [0, 1, 2, 3]
