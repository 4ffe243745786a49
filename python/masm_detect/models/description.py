"""What a backbone is built from without its weights, as plain values for JSON; and the backbone built from it."""

from __future__ import annotations

from typing import Any

from torch import nn

from masm_detect.errors import BackboneError
from masm_detect.models import open_clip_wrapper
from masm_detect.models.backbone import Backbone

#: Keys of a configuration of transformers that are no property of the backbone: the labels are of a former classifier.
_NOT_THE_MODEL = ("_name_or_path", "name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures")
_NOT_THE_MODEL += ("id2label", "label2id", "num_labels", "label_names", "label_descriptions", "problem_type")


def describe(backbone: Backbone) -> dict[str, Any]:
    """The architecture of `backbone`, its input and its pooling; holds no path and no weight."""
    config = {key: value for key, value in backbone.model.config.to_dict().items() if key not in _NOT_THE_MODEL}
    return {
        "model": config,
        "image_size": backbone.image_size,
        "pool": backbone.pool,
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }


def build(description: dict[str, Any]) -> Backbone:
    """A backbone with random float32 weights, from the result of `describe`.

    Raises:
        BackboneError: the installed libraries do not know the architecture.
    """
    values = {key: description[key] for key in ("image_size", "pool", "mean", "std")}
    return Backbone(_model(dict(description["model"])).eval(), **values)


def _model(config: dict[str, Any]) -> nn.Module:
    import transformers

    kind = config.pop("model_type")
    if kind == open_clip_wrapper.MODEL_TYPE:
        return open_clip_wrapper.build_tower(config)
    try:
        known = transformers.AutoConfig.for_model(kind, **config)
        if kind == "vit":  # `load_backbone` reads ViT without its pooler, too
            return transformers.ViTModel(known, add_pooling_layer=False)
        return transformers.AutoModel.from_config(known)
    except (ValueError, ImportError) as error:
        raise BackboneError(
            f"the installed transformers {transformers.__version__} cannot build a {kind!r} model ({error}): update "
            "it, and install timm if the model is one of timm"
        ) from error
