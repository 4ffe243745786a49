"""A classifier fitted to the pretrained features, through which gradients of the weights are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from masm_detect.config import ConfigError
from masm_detect.models.detector import Detector
from masm_ext.calibration import evaluation_mode

#: Weight of the mean loss against the penalty |w|^2 / 2 on the weights of standardised features: small, because a few
#: hundred images must do.
_STRENGTH = 50.0


@contextmanager
def fitted_head(detector: Detector, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within the context, the head of `detector` separates the classes of `batches`; afterwards it is as before.

    It is a logistic regression on the standardised features, with an L2 penalty. A head that was not trained would send
    gradients in the direction of its random weights.

    Args:
        detector: in any mode; the mode stays as it is.
        batches: (images [B, 3, H, W], labels [B]).

    Raises:
        ConfigError: all images of the batches are real, or all are fake.
    """
    features, labels = _features(detector, batches)
    if len(np.unique(labels)) < 2:
        raise ConfigError(
            f"directions 'gradient' need real and fake images, and the first {len(labels)} are of one class: raise "
            "method.masm.direction_batches"
        )
    mean, deviation = features.mean(axis=0), features.std(axis=0) + 1e-6
    fit = LogisticRegression(C=_STRENGTH / len(labels), max_iter=1000).fit((features - mean) / deviation, labels)
    weight = fit.coef_[0] / deviation
    kept = {name: value.detach().clone() for name, value in detector.head.named_parameters()}
    try:
        with torch.no_grad():
            detector.head.weight.copy_(torch.from_numpy(weight)[None])
            detector.head.bias.fill_(float(fit.intercept_[0] - weight @ mean))
        yield
    finally:
        with torch.no_grad():
            for name, value in detector.head.named_parameters():
                value.copy_(kept[name])


@torch.no_grad()
def _features(detector: Detector, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[np.ndarray, np.ndarray]:
    """Features [n, feature_dim], float64, and labels [n] of all images."""
    with evaluation_mode(detector):
        parts = [(detector(images, return_features=True)[1], labels) for images, labels in batches]
    features = torch.cat([part.double().cpu() for part, _ in parts])
    if not features.isfinite().all():
        raise ConfigError("the pretrained backbone gives features that are not finite for the training images")
    return features.numpy(), torch.cat([labels.cpu() for _, labels in parts]).numpy().astype(int)
