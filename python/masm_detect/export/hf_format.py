"""`hf`: a folder for `transformers.pipeline("image-classification", model=FOLDER)`, without remote code.

The classification models of transformers have a head of their own on fixed features. The export is exact where these
features contain the one that the detector pools: a part of the head's weight is then the detector's head, the rest is
zero. Where they do not (CLIP: the mean of the patch tokens before the final norm), and for recompression before
resizing, the export is a model of `masm_detect.hub`, which must be imported before transformers loads it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masm_detect.models.backbone import Backbone
from masm_detect.results import write_json

from .format import ExportError, ExportFormat, Loaded, Run
from .plain import make_plain
from .preprocessing import preprocessing_of

#: Pillow's number of bicubic resampling, as preprocessor_config.json gives it.
BICUBIC = 3
#: Registers models on every backbone with transformers; imported only where it is needed, for it loads transformers.
HUB = "masm_detect.hub"


@dataclass(frozen=True)
class Classifier:
    """An image classification model of transformers.

    Attributes:
        name: its class
        backbone: its attribute that holds the backbone
        features: how a detector pools -> the number of the part of the head's input that holds this feature
        parts: number of parts of the head's input, each as wide as the backbone
        positions: its position embeddings are for one size, and the model resizes them only on request
    """

    name: str
    backbone: str
    features: dict[str, int]
    parts: int = 1
    positions: bool = False


#: `model_type` of a backbone -> the model that computes the same logits. The heads of DINOv2 read the class token and
#: the mean of the patch tokens (without registers), that of ViT the class token, that of SigLIP the mean of all tokens.
CLASSIFIERS = {
    "dinov2": Classifier("Dinov2ForImageClassification", "dinov2", {"cls": 0, "pooler": 0, "mean": 1}, parts=2),
    "dinov2_with_registers": Classifier(
        "Dinov2WithRegistersForImageClassification",
        "dinov2_with_registers",
        {"cls": 0, "pooler": 0, "mean": 1},
        parts=2,
    ),
    "vit": Classifier("ViTForImageClassification", "vit", {"cls": 0}, positions=True),
    "siglip_vision_model": Classifier("SiglipForImageClassification", "vision_model", {"mean": 0}, positions=True),
}


class HfFormat(ExportFormat):
    """config.json, model.safetensors and preprocessor_config.json, with the labels real and fake."""

    library = "transformers"
    usage = "hf"
    compared = "transformers (AutoModelForImageClassification, AutoImageProcessor)"

    def needed_import(self, run: Run) -> tuple[str, str] | None:
        if run.config.data.normalize_first is not None:
            return HUB, (
                "the run recompresses every image first (data.normalize_first), which no image processor of "
                "transformers does"
            )
        try:
            classifier_of(run.detector.backbone)
        except ExportError as error:
            return HUB, str(error)
        return None

    def write(self, run: Run, folder: Path) -> None:
        make_plain(run.detector)
        if self.needed_import(run) is not None:
            _save_for_hub(run, folder)
        else:
            with _no_progress_bars():
                classification_model(run.detector).save_pretrained(folder)
            write_json(folder / "preprocessor_config.json", processor_config(run))
        write_json(folder / "preprocessing.json", preprocessing_of(run))

    def load(self, run: Run, folder: Path) -> Loaded:
        import transformers
        from transformers.image_utils import load_image
        from transformers.utils import is_torchvision_available

        hub = self.needed_import(run) is not None
        if hub:
            import_module(HUB)
        with _no_progress_bars():
            model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()

        @torch.inference_mode()
        def logits(pixels: Tensor) -> Tensor:
            real, fake = model(pixel_values=pixels).logits.unbind(1)
            return fake - real

        def by(processor: Any) -> Callable[[str], float]:
            return lambda path: float(logits(processor(load_image(path), return_tensors="pt")["pixel_values"]))

        if hub:
            return Loaded(logits, {HUB: by(transformers.AutoImageProcessor.from_pretrained(folder))}, (HUB,))
        processors, missing = {"pil": by(_processor(folder, "pil"))}, {}
        if is_torchvision_available():
            processors["torchvision"] = by(_processor(folder, "torchvision"))
        else:
            missing["torchvision"] = "torchvision is not installed"
        return Loaded(logits, processors, ("pil",), missing)


def _save_for_hub(run: Run, folder: Path) -> None:
    from masm_detect.hub.modeling import DetectorForImageClassification

    DetectorForImageClassification.from_detector(
        run.detector, base_model=run.config.model.backbone, base_hash=run.base_hash, data=run.config.data
    ).save_pretrained(folder)


def classifier_of(backbone: Backbone) -> Classifier:
    """The classification model of transformers that can compute the logits of a detector on `backbone`.

    Raises:
        ExportError: there is none, or its head does not read the feature that the backbone pools.
    """
    classifier = CLASSIFIERS.get(backbone.model_type)
    if classifier is None:
        reason = (
            "CLIPForImageClassification reads the mean of the patch tokens before CLIP's final norm"
            if backbone.model_type == "clip_vision_model"
            else f"hf knows {', '.join(CLASSIFIERS)}"
        )
        raise ExportError(
            f"transformers has no classification model that computes the logits of a detector on "
            f"{backbone.model_type!r} ({reason})"
        )
    if backbone.pool not in classifier.features:
        raise ExportError(
            f"the detector pools {backbone.pool!r} (model.pool), but the head of {classifier.name} reads "
            f"{' and '.join(classifier.features)}"
        )
    return classifier


@torch.no_grad()
def classification_model(detector: nn.Module) -> nn.Module:
    """A classification model of transformers with logits (0, z), z the logit of a plain `detector`: softmax gives
    P(fake) = sigmoid(z).
    """
    import transformers

    backbone, head = detector.backbone, detector.head
    classifier = classifier_of(backbone)
    model = getattr(transformers, classifier.name)(_model_config(backbone, classifier))
    state = dict(backbone.model.state_dict())
    if classifier.positions:
        _resize_positions(backbone, state)
    getattr(model, classifier.backbone).load_state_dict(state, strict=True)
    width, part = backbone.feature_dim, classifier.features[backbone.pool]
    model.classifier.weight.zero_()
    model.classifier.weight[1, part * width : (part + 1) * width] = head.weight[0]
    model.classifier.bias.copy_(torch.stack([torch.zeros(()), head.bias[0]]))
    return model.eval()


def processor_config(run: Run) -> dict[str, Any]:
    """The content of preprocessor_config.json: the detector's own preprocessing, in transformers' words."""
    backbone = run.detector.backbone
    square = {"height": backbone.image_size, "width": backbone.image_size}
    config = {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square,
        "resample": BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(backbone.mean),
        "image_std": list(backbone.std),
    }
    if run.config.data.crop == "center":
        # BiT's processor crops as `transforms.ImageTransform` does, without resampling
        config |= {"image_processor_type": "BitImageProcessor", "do_resize": False}
        config |= {"do_center_crop": True, "crop_size": square}
    return config


def _model_config(backbone: Backbone, classifier: Classifier) -> Any:
    import transformers

    config = copy.deepcopy(backbone.model.config)
    if classifier.positions:
        config.image_size = backbone.image_size
    config.name_or_path = ""  # a folder of this machine
    if backbone.model_type == "siglip_vision_model":
        config = transformers.SiglipConfig(vision_config=config.to_dict())
    config.name_or_path = ""
    config.architectures = [classifier.name]
    config.num_labels = 2
    config.id2label, config.label2id = {0: "real", 1: "fake"}, {"real": 0, "fake": 1}
    config.problem_type = "single_label_classification"
    return config


def _resize_positions(backbone: Backbone, state: dict[str, Tensor]) -> None:
    """Replace the position embeddings in `state` by those that the model interpolates for the detector's input size."""
    embeddings = getattr(backbone.model, "vision_model", backbone.model).embeddings
    [name] = [name for name in state if name.rpartition("embeddings.")[2].startswith("position_embedding")]
    known = state[name]
    side, patches = backbone.image_size, (backbone.image_size // backbone.patch_size) ** 2
    tokens = patches + known.shape[-2] - _pretrained_patches(backbone)
    if tokens != known.shape[-2]:
        resized = embeddings.interpolate_pos_encoding(known.new_zeros(1, tokens, known.shape[-1]), side, side)
        state[name] = resized.reshape(*known.shape[:-2], tokens, known.shape[-1])
    # SigLIP numbers its positions in a buffer that is in no state


def _pretrained_patches(backbone: Backbone) -> int:
    size = backbone.model.config.image_size
    return ((size if isinstance(size, int) else size[0]) // backbone.patch_size) ** 2


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Without the bars of transformers, which hide ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _processor(folder: Path, backend: str) -> Any:
    import transformers

    major = int(transformers.__version__.split(".")[0])
    choice = {"backend": backend} if major >= 5 else {"use_fast": backend == "torchvision"}
    return transformers.AutoImageProcessor.from_pretrained(folder, **choice)
