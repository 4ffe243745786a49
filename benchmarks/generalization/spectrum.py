"""The baseline without a network: logistic regression on the radial power spectrum, without any image content."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from masm_detect.data.sample import Sample
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def radial_spectrum(rgb: np.ndarray) -> np.ndarray:
    """Log power of the grey image [H, W, 3], averaged over rings of one frequency step: float64 [min(H, W) // 2]."""
    grey = rgb.astype(np.float64).mean(axis=2)
    window = np.outer(np.hanning(grey.shape[0]), np.hanning(grey.shape[1]))
    power = np.abs(np.fft.fftshift(np.fft.fft2((grey - grey.mean()) * window))) ** 2
    y, x = np.indices(power.shape)
    radius = np.hypot(y - power.shape[0] // 2, x - power.shape[1] // 2).astype(int)
    rings = min(power.shape) // 2
    inside = radius < rings
    mean = np.bincount(radius[inside], power[inside], rings) / np.bincount(radius[inside], minlength=rings)
    return np.log(mean + 1e-9)


def spectrum_scores(train: list[Sample], test: list[Sample], images: Mapping[str, np.ndarray]) -> np.ndarray:
    """P(fake) of each test sample by a classifier fitted on `train`: float64 [len(test)]; `images`: pixels by path."""
    features = [np.stack([radial_spectrum(images[sample.path]) for sample in part]) for part in (train, test)]
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    model.fit(features[0], [sample.label for sample in train])
    return model.predict_proba(features[1])[:, 1]
