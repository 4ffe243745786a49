"""Settings of the data: where images are, how they are read and augmented; a part of `config`, where everything imports
them from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import ConfigError
from .errors import require_setting as _require


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. Each probability is per image (0: off); each range is [low, high], sampled uniformly.

    Attributes:
        flip: probability of mirroring left-right
        jpeg: probability of a JPEG recompression
        jpeg_quality: range of the JPEG quality, 1 to 100
        blur: probability of a Gaussian blur
        blur_sigma: range of the blur's sigma in pixels
        brightness_contrast: probability of a change of brightness and contrast: every pixel p becomes p (1 + c) + 255 b
        brightness_contrast_limit: b and c are sampled from [-limit, limit]
        noise: probability of Gaussian noise
        noise_sigma: range of the noise's standard deviation, for pixels of 0 to 255
        downscale: probability of resizing to a smaller size and back
        downscale_factor: range of the smaller size, as a fraction of the original
        albumentations: more augmentation, after that above: transforms of the library albumentations with their
            arguments, by its names: [{HorizontalFlip: {p: 0.5}}, {OneOf: {p: 0.5, transforms: [...]}}]; null: none
    """

    flip: float = 0.5
    jpeg: float = 0.0
    jpeg_quality: tuple[int, int] = (40, 100)
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.4, 2.0)
    brightness_contrast: float = 0.0
    brightness_contrast_limit: float = 0.1
    noise: float = 0.0
    noise_sigma: tuple[float, float] = (1.0, 8.0)
    downscale: float = 0.0
    downscale_factor: tuple[float, float] = (0.5, 0.9)
    albumentations: list[dict[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in ("flip", "jpeg", "blur", "brightness_contrast", "noise", "downscale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is a probability and must be in [0, 1], got {getattr(self, name)}")
        for name in ("jpeg_quality", "blur_sigma", "noise_sigma", "downscale_factor"):
            low, high = getattr(self, name)
            if not 0 < low <= high or (name == "jpeg_quality" and high > 100):
                limit = "0 < low <= high" + (" <= 100" if name == "jpeg_quality" else "")
                raise ConfigError(f"{name} must be (low, high) with {limit}, got {(low, high)}")


@dataclass(frozen=True)
class HfConfig:
    """What to read of Hugging Face data sets (paths that start with hf:).

    Attributes:
        image: column of the images
        label: column of the labels: names such as real and fake, or numbers or truth values with label_map
        method: column of the forgery methods of fake images; null: the column method if there is one, else the label
        video: column of the videos; null: the column video if there is one, else every image is a video
        group: column of what must stay in one split, such as the person; null: the column group if there is one, else
            the video
        split: column of the splits; null: the splits of the data set
        subset: subset (configuration) of the data set; null: the only one, or the default
    """

    image: str = "image"
    label: str = "label"
    method: str | None = None
    video: str | None = None
    group: str | None = None
    split: str | None = None
    subset: str | None = None


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are read.

    Attributes:
        paths: DeepfakeBench JSON files, folders with real/ and fake-<method>/, or Hugging Face data sets (hf:FOLDER,
            hf:NAME): one, or a list [a, b]
        methods: keep only these forgery methods (one, or a list), and all real samples; null: all
        splits: read only these splits (one, or a list), e.g. [train] if the val split of a file repeats the test
            videos; null: all
        root: for JSON files: the folder that relative frame paths start from; null: the folder of the file
        prefix_map: for JSON files: {prefix of a path in the file: prefix here}, applied before root; the longest match
            wins
        compression: for JSON files: c23, c40, ... if the file has several; null: the only one
        label_map: for JSON files and hf: paths: {label there: 0 (real) or 1 (fake)}, used before the known label names;
            null: known names only
        video_pattern: for folders: regular expression whose group 1 is the name of the video in the name of a loose
            image, e.g. "(.+)_[0-9]+" for video_frame.jpg; null: each loose image is a video
        missing: for JSON files: what to do if a frame does not exist: error, or skip it (one warning gives the number)
        hf: for hf: paths: which columns to read
        val_fraction: share of the groups (videos, pairs, photographs) held out for validation if no sample has the
            split val; taken from the samples of train and those without a split
        split_seed: seed of that random choice
        frames_per_video: number of frames kept per video, evenly spread; null: all
        crop: resize: the whole image is resized to the input size; center: the middle is cut out, without resampling
        normalize_first: [side in pixels, JPEG quality]: resize and recompress every image alike before anything else,
            for data sets whose classes differ in size or format; null: off
        augment: random changes of the images in training; null: none
        self_blended: train and validate on the real images and self-blended versions of them, instead of the fakes of
            the data
        as_is: do not compare how the data sets were cut (crops.json), and do not record it in the run
    """

    paths: list[str] | str = field(default_factory=list)
    methods: list[str] | str | None = None
    splits: list[str] | str | None = None
    root: str | None = None
    prefix_map: dict[str, str] | None = None
    compression: str | None = None
    label_map: dict[str, int] | None = None
    video_pattern: str | None = None
    missing: Literal["error", "skip"] = "error"
    hf: HfConfig = field(default_factory=HfConfig)
    val_fraction: float = 0.2
    split_seed: int = 0
    frames_per_video: int | None = None
    crop: Literal["resize", "center"] = "resize"
    normalize_first: tuple[int, int] | None = None
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)
    self_blended: bool = False
    as_is: bool = False

    def __post_init__(self) -> None:
        for name in ("paths", "methods", "splits"):
            word = getattr(self, name)
            if isinstance(word, str):
                _require(not word.startswith("["), f"data.{name}", word, "one, or a list of words: [a, b]")
                object.__setattr__(self, name, [word])
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1, e.g. 0.2")
        _require(
            self.frames_per_video is None or self.frames_per_video >= 1,
            "data.frames_per_video",
            self.frames_per_video,
            "at least 1, or null for all",
        )
