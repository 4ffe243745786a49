"""Checkpoints of transformers, timm and open_clip, from a folder or the hub; weights are read as safetensors only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from masm_detect.errors import BackboneError
from masm_detect.models import naflex, open_clip_wrapper, timm_wrapper


def load_pretrained(
    name: str, image_size: int | None, dtype: torch.dtype, local_files_only: bool, cache_dir: str | Path | None
) -> nn.Module:
    """The pretrained vision model of a checkpoint, in eval mode; the arguments are those of `backbone.load_backbone`.

    Raises:
        BackboneError: the checkpoint is absent, damaged, incomplete, or of a family that is not read.
    """
    import transformers

    options = {"local_files_only": local_files_only, "cache_dir": cache_dir}
    if name.startswith(open_clip_wrapper.PREFIX):
        source = name.removeprefix(open_clip_wrapper.PREFIX)
        return open_clip_wrapper.load_tower(
            name, image_size, dtype, lambda file: _checkpoint_file(source, file, **options)
        )
    try:
        config = transformers.AutoConfig.from_pretrained(name, **options)
    except ImportError as error:
        raise BackboneError(f"cannot load {name!r}: {timm_wrapper.NEEDS_TIMM} ({error})") from error
    except (OSError, ValueError, KeyError) as error:
        if _is_open_clip(name, **options):
            raise BackboneError(
                f"{name!r} is an open_clip checkpoint: write {open_clip_wrapper.PREFIX}{name} as the name of the "
                "backbone"
            ) from error
        raise BackboneError(
            f"cannot read the configuration of {name!r}: neither a local folder with config.json "
            f"nor a reachable hub id ({error})"
        ) from error
    # from_pretrained only warns of missing weights and leaves them random; output_loading_info lets us raise.
    options |= {"dtype": dtype, "output_loading_info": True, "use_safetensors": True}
    vision_towers = {
        "clip": transformers.CLIPVisionModel, "clip_vision_model": transformers.CLIPVisionModel,
        "siglip": transformers.SiglipVisionModel, "siglip_vision_model": transformers.SiglipVisionModel,
        "siglip2": transformers.Siglip2VisionModel, naflex.MODEL_TYPE: transformers.Siglip2VisionModel,
    }  # fmt: skip
    if config.model_type in vision_towers:
        loader = vision_towers[config.model_type]
        options["config"] = getattr(config, "vision_config", config)
    elif config.model_type == timm_wrapper.MODEL_TYPE:
        timm_wrapper.prepare_config(config, image_size)
        loader, options["config"] = transformers.AutoModel, config
    elif hasattr(config, "vision_config") or not hasattr(config, "patch_size"):
        raise BackboneError(
            f"{name!r} is a {config.model_type!r} model; known are CLIP, SigLIP, ViT, DINO, vision-only "
            "ViTs, and those of timm and open_clip"
        )
    else:
        loader = transformers.AutoModel
        if config.model_type == "vit":
            options["add_pooling_layer"] = False
    try:
        model, info = loader.from_pretrained(name, **options)
    except (OSError, SafetensorError) as error:
        raise BackboneError(f"cannot load the weights of {name!r} as safetensors (damaged?): {error}") from error
    except (TypeError, ImportError) as error:  # timm does not know an argument, or the architecture
        if config.model_type != timm_wrapper.MODEL_TYPE:
            raise
        raise BackboneError(
            f"{name!r}: timm cannot build {config.architecture!r} with {config.model_args} ({error}): upgrade timm if "
            "it does not know the name; leave image_size unset if the model takes one size only"
        ) from error
    problems = {k: sorted(map(str, info.get(k) or ())) for k in ("missing_keys", "mismatched_keys", "error_msgs")}
    if any(problems.values()):
        detail = "; ".join(f"{k} ({len(v)}): {v[:5]}" for k, v in problems.items() if v)
        raise BackboneError(f"the checkpoint {name!r} does not fill a {type(model).__name__}: {detail}")
    return model.eval()


def without_folder(name: str) -> tuple[str, bool]:
    """A backbone's name without the folder of this machine that it may be in, and whether it is such a folder."""
    prefix = open_clip_wrapper.PREFIX if name.startswith(open_clip_wrapper.PREFIX) else ""
    path = Path(name.removeprefix(prefix))
    return (prefix + path.name, True) if path.exists() else (name, False)


def _is_open_clip(name: str, **options: Any) -> bool:
    try:
        return _checkpoint_file(name, "open_clip_config.json", **options) is not None
    except OSError:  # no such repository
        return False


def _checkpoint_file(name: str, file: str, local_files_only: bool, cache_dir: str | Path | None) -> str | None:
    """The path of a file of a checkpoint; None if the checkpoint does not have it or cannot be reached."""
    from transformers.utils import cached_file

    return cached_file(
        name, file, local_files_only=local_files_only, cache_dir=cache_dir,
        _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip


def pixel_statistics(
    name: str, local_files_only: bool, cache_dir: str | Path | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Mean and std of preprocessor_config.json, or (None, None) if the checkpoint has none."""
    if name.startswith(open_clip_wrapper.PREFIX):
        return None, None  # they are in the configuration of the model
    path = _checkpoint_file(name, "preprocessor_config.json", local_files_only, cache_dir)
    if path is None:
        return None, None
    try:
        settings = json.loads(Path(path).read_text())
    except ValueError as error:
        raise BackboneError(f"{path} is not valid JSON ({error})") from error
    mean, std = settings.get("image_mean"), settings.get("image_std")
    if mean is None or std is None:
        return None, None
    if len(mean) != 3 or len(std) != 3:
        raise BackboneError(f"{path}: image_mean and image_std must have 3 values, got {mean} and {std}")
    return tuple(mean), tuple(std)
