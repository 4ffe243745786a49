"""Augmentation that a config describes by the names of albumentations."""

from __future__ import annotations

import numpy as np
import pytest
from masm_detect.config import AugmentConfig
from masm_detect.data.albumentations_pipeline import PipelineError, apply_pipeline, build_pipeline
from masm_detect.data.transforms import ImageTransform, transform_image

PIPELINE = [
    {"HorizontalFlip": {"p": 0.5}},
    {"OneOf": {"transforms": [{"RandomBrightnessContrast": {"brightness_limit": [-0.3, 0.3]}}, {"CLAHE": None}]}},
    {"ImageCompression": {"quality_range": [40, 100], "p": 1.0}},
]


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8)


def test_the_same_seed_gives_the_same_image(seed):
    rgb = image(seed)
    first, again = (apply_pipeline(PIPELINE, rgb, seed) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert len({apply_pipeline(PIPELINE, rgb, seed + i).tobytes() for i in range(4)}) == 4


def test_transforms_are_drawn_independently(seed):
    rgb = image(seed)
    flips = [{"HorizontalFlip": {"p": 0.5}}, {"VerticalFlip": {"p": 0.5}}, {"InvertImg": {"p": 0.5}}]
    found = [apply_pipeline(flips, rgb, seed + i).tobytes() for i in range(200)]
    counts = [found.count(one) for one in set(found)]
    assert len(counts) == 8 and max(counts) < 60  # 25 expected of each combination


def test_names_and_arguments_reach_the_library(seed):
    import albumentations

    rgb = image(seed)
    np.testing.assert_array_equal(apply_pipeline([{"HorizontalFlip": {"p": 1.0}}], rgb, seed), rgb[:, ::-1])
    built = build_pipeline(PIPELINE)
    assert isinstance(built[1], albumentations.OneOf) and len(built[1].transforms) == 2
    assert built[1].transforms[0].brightness_limit == (-0.3, 0.3) and built[2].quality_range == (40, 100)
    assert build_pipeline(PIPELINE) is built


def test_a_transform_of_a_training_image_applies_it_last(seed):
    rgb = image(seed)
    transform = ImageTransform(
        40, (0.5,) * 3, (0.5,) * 3, augment=AugmentConfig(flip=1.0, albumentations=[{"HorizontalFlip": {"p": 1.0}}])
    )
    plain = ImageTransform(40, (0.5,) * 3, (0.5,) * 3)
    rng = np.random.default_rng(seed)
    assert (transform_image(rgb, transform, rng) == transform_image(rgb, plain)).all()  # mirrored twice


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ([{"NoSuchTransform": {}}], "has no transform 'NoSuchTransform'"),
        ([{"HorizontalFlip": {"probability": 1}}], "no argument probability"),
        ([{"Rotate": {"limit": "wide"}}], "Rotate"),
        ([{"HorizontalFlip": {}, "VerticalFlip": {}}], "each transform is"),
        (["HorizontalFlip"], "each transform is"),
        ([{"HorizontalFlip": 0.5}], "not a mapping"),
        ([{"OneOf": {"transforms": [{"Nothing": {}}]}}], "has no transform 'Nothing'"),
        ([{"load": {"filepath_or_buffer": "x"}}], "has no transform 'load'"),
    ],
)
def test_what_the_library_does_not_know_is_an_error_before_the_first_image(transforms, message):
    with pytest.raises(PipelineError, match=message):
        ImageTransform(40, (0.5,) * 3, (0.5,) * 3, augment=AugmentConfig(albumentations=transforms))


@pytest.mark.parametrize("transform", ["Normalize", "ToGray"])
def test_a_result_that_is_no_picture_is_an_error(seed, transform):
    arguments = {"p": 1.0} if transform == "Normalize" else {"p": 1.0, "num_output_channels": 1}
    with pytest.raises(PipelineError, match="leave out what converts"):
        apply_pipeline([{transform: arguments}], image(seed), seed)
