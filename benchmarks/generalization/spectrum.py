"""The baseline without a network: logistic regression on the radial power spectrum, without any image content."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from masm_detect.data.sample import Sample
from masm_detect.doctor.spectrum import radial_spectrum, spectrum_model


def spectrum_scores(train: list[Sample], test: list[Sample], images: Mapping[str, np.ndarray]) -> np.ndarray:
    """P(fake) of each test sample by a classifier fitted on `train`: float64 [len(test)]; `images`: pixels by path."""
    features = [np.stack([radial_spectrum(images[sample.path]) for sample in part]) for part in (train, test)]
    model = spectrum_model().fit(features[0], [sample.label for sample in train])
    return model.predict_proba(features[1])[:, 1]
