"""Augmentation that a config describes by the names and arguments of the library albumentations (2.x).

Recipes of other projects are written with it or with the same operations of torchvision, so `masm train` can use
them as they stand: https://albumentations.ai/docs.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from masm_detect.errors import UserError


class PipelineError(UserError, ValueError):
    """A list of transforms that albumentations does not know, or cannot apply to images alone."""


def build_pipeline(transforms: Sequence[dict[str, Any]]) -> Any:
    """The pipeline that `transforms` describes, as `albumentations.Compose`; built once for each description.

    Args:
        transforms: one mapping each: {name of the transform: its arguments}. A group such as OneOf has its members in
            its argument `transforms`, in the same form.

    Raises:
        PipelineError: albumentations is not installed, or does not have such a transform or argument.
    """
    return _built(json.dumps(list(transforms), sort_keys=True, default=repr))


def apply_pipeline(transforms: Sequence[dict[str, Any]], rgb: np.ndarray, seed: int) -> np.ndarray:
    """Augment an RGB uint8 image [H, W, 3]; the same image and seed give the same result.

    Raises:
        PipelineError: the result is no uint8 image of three channels, for example after Normalize.
    """
    pipeline = build_pipeline(transforms)
    # not set_random_seed: it gives every transform a generator with the same seed, so that all act together or none
    pipeline.set_random_state(np.random.default_rng(seed), random.Random(seed))
    out = pipeline(image=rgb)["image"]
    if not isinstance(out, np.ndarray) or out.dtype != np.uint8 or out.ndim != 3 or out.shape[2] != 3:
        found = f"{out.dtype} {list(out.shape)}" if isinstance(out, np.ndarray) else type(out).__name__
        raise PipelineError(
            f"data.augment.albumentations made {found} of an image; leave out what converts to floats or tensors "
            "(Normalize, ToTensorV2): the detector does that itself"
        )
    return np.ascontiguousarray(out)


@functools.lru_cache(maxsize=8)
def _built(description: str) -> Any:
    # Otherwise the import asks pypi.org for a newer version; reading pictures needs no network.
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    try:
        import albumentations
    except ImportError as error:
        raise PipelineError("data.augment.albumentations needs the library: pip install albumentations") from error
    return albumentations.Compose([_transform(albumentations, one) for one in json.loads(description)])


def _transform(library: Any, described: Any) -> Any:
    if not isinstance(described, dict) or len(described) != 1:
        raise PipelineError(
            f"data.augment.albumentations has {described!r}; each transform is {{name: {{argument: value}}}}, "
            "e.g. {HorizontalFlip: {p: 0.5}}"
        )
    ((name, arguments),) = described.items()
    kind = getattr(library, str(name), None)
    if not (isinstance(kind, type) and issubclass(kind, (library.BasicTransform, library.BaseCompose))):
        raise PipelineError(
            f"data.augment.albumentations: albumentations {library.__version__} has no transform {name!r}; its names "
            "are at https://albumentations.ai/docs"
        )
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise PipelineError(f"data.augment.albumentations: the arguments of {name} are {arguments!r}, not a mapping")
    # YAML has lists only, albumentations wants pairs
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in arguments.items()}
    if issubclass(kind, library.BaseCompose):
        values["transforms"] = [_transform(library, one) for one in arguments.get("transforms", ())]
    try:
        unknown = sorted(set(values) - set(_arguments(kind)))
        if unknown:
            # albumentations only warns of these and goes on without them
            raise ValueError(f"no argument {', '.join(unknown)}; it has {', '.join(_arguments(kind))}")
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise PipelineError(f"data.augment.albumentations: {name}: {' '.join(str(error).split())}") from error


def _arguments(kind: type) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]
