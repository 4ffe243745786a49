"""`DetectorConfig`: config.json of a detector that transformers loads."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from masm_detect.errors import UserError

MODEL_TYPE = "masm_detector"


class HubError(UserError, ValueError):
    """A folder, hub id or request that cannot become a detector; the message names what arrived and what to do."""


class DetectorConfig(PretrainedConfig):
    """What a detector is built from, and how its input is prepared.

    Args:
        backbone: architecture, input size in pixels, pooling and pixel statistics (`models.description.describe`).
        crop: "resize" or "center", as `data.crop` of a run.
        normalize_first: [side in pixels, JPEG quality] of the first recompression, as `data.normalize_first`, or None.
        merged: the weights are in `model.safetensors`; False: adapter and head only, on the weights of `base_model`.
        base_model: name of the pretrained backbone, as `model.backbone` of a run; None: not known.
        base_sha256: SHA-256 of its weights in hexadecimal (`methods.adapters.base_sha256`).
        method: the settings of the method (`config.MethodConfig`), needed if not merged.
        **kwargs: as of `transformers.PretrainedConfig`. The labels are real (0) and fake (1).
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        backbone: dict[str, Any] | None = None,
        crop: str = "resize",
        normalize_first: list[int] | None = None,
        merged: bool = True,
        base_model: str | None = None,
        base_sha256: str | None = None,
        method: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        self.backbone = backbone
        self.crop = crop
        self.normalize_first = None if normalize_first is None else list(normalize_first)
        self.merged = merged
        self.base_model = base_model
        self.base_sha256 = base_sha256
        self.method = method
        labels = {"id2label": {0: "real", 1: "fake"}, "label2id": {"real": 0, "fake": 1}}
        super().__init__(**labels | {"problem_type": "single_label_classification"} | kwargs)
