"""Detectors as models of transformers: importing this package registers them with the Auto classes and `pipeline`.

    import masm_detect.hub
    from transformers import pipeline
    pipeline("image-classification", model="FOLDER OR HUB ID")("face.png")

No code is loaded from a checkpoint (`trust_remote_code` is not needed), and weights are read as safetensors only.
"""

from __future__ import annotations

import inspect

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from .configuration import MODEL_TYPE as MODEL_TYPE
from .configuration import DetectorConfig as DetectorConfig
from .configuration import HubError as HubError
from .modeling import DetectorForImageClassification as DetectorForImageClassification
from .processing import DetectorImageProcessor as DetectorImageProcessor
from .upload import push_export as push_export

__all__ = [
    "DetectorConfig",
    "DetectorForImageClassification",
    "DetectorImageProcessor",
    "HubError",
    "push_export",
]


def _register() -> None:
    AutoConfig.register(MODEL_TYPE, DetectorConfig, exist_ok=True)
    AutoModelForImageClassification.register(DetectorConfig, DetectorForImageClassification, exist_ok=True)
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        # one class, whether or not torchvision is installed: it resizes as in training
        both = {"pil": DetectorImageProcessor, "torchvision": DetectorImageProcessor}
        AutoImageProcessor.register(DetectorConfig, image_processor_classes=both, exist_ok=True)
    else:  # transformers 4
        AutoImageProcessor.register(DetectorConfig, slow_image_processor_class=DetectorImageProcessor, exist_ok=True)


_register()
