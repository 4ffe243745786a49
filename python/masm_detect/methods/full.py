"""Full fine-tuning: every parameter of the detector is trained."""

from __future__ import annotations

from masm_detect.config import MethodConfig
from masm_detect.models.detector import Detector

from .method import Calibration, MethodSpec, Rates


class Full(MethodSpec):
    """Trains backbone and head."""

    rates = Rates(lr=1e-5)

    def prepare(
        self, detector: Detector, config: MethodConfig, calibration: Calibration | None = None, progress: bool = False
    ) -> None:
        detector.requires_grad_(True)
