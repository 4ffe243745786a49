"""Scores come in the order of the samples."""

from __future__ import annotations

import numpy as np
import torch
from masm_detect.config import DataConfig
from masm_detect.data.folders import read_folder
from masm_detect.data.frames import frame_dataset
from masm_detect.evaluation.predict import predict, score_samples


def test_scores_are_in_the_order_of_the_samples(tiny_data, tiny_detector):
    detector = tiny_detector()
    samples = read_folder(tiny_data)
    dataset = frame_dataset(samples, detector.backbone, DataConfig())
    together = predict(detector, dataset, batch_size=5)
    alone = torch.cat([predict(detector, frame_dataset([s], detector.backbone, DataConfig())) for s in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.dtype == torch.float32 and together.device.type == "cpu"
    assert torch.equal(together, predict(detector, dataset, batch_size=5, workers=2))
    scores = score_samples(detector, dataset)
    assert scores.dtype == np.float64 and scores.min() > 0 and scores.max() < 1
    np.testing.assert_allclose(scores, torch.sigmoid(together.double()).numpy())
