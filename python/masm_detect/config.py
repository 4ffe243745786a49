"""Settings of a run: frozen dataclasses, checked when made, read and overridden by jsonargparse (`commands/main.py`).

Their docstrings are the help texts of `masm <command> --help`. A function takes the dataclass it needs; only
`training.run.train`, which is the whole run, takes all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from .data_config import AugmentConfig as AugmentConfig
from .data_config import DataConfig, HfConfig
from .errors import ConfigError
from .errors import require_setting as _require
from .method_config import MasmOptions as MasmOptions
from .method_config import MethodConfig

Precision = Literal["auto", "bf16", "fp16", "fp32"]


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone.

    Attributes:
        backbone: a hub id or local folder of a vision transformer of transformers or timm, open_clip: and a hub id or
            folder of open_clip, or bundled:dinov2-small
        image_size: input side in pixels, a multiple of the model's patch size (14 for bundled:dinov2-small and the
            default backbone); null: the model's own (224 for DINOv2)
        pool: the feature of an image: cls (class token after the final norm), mean (of the patches), pooler (the
            model's own head) or auto (cls; pooler for SigLIP and timm; mean without a class token)
        local_files_only: use local and cached files only, without downloads
    """

    backbone: str = "openai/clip-vit-large-patch14"
    image_size: int | None = None
    pool: str = "auto"
    local_files_only: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.backbone), "model.backbone", self.backbone, "a hub id, a folder or bundled:dinov2-small")
        _require(
            self.image_size is None or self.image_size >= 14,
            "model.image_size",
            self.image_size,
            "at least 14, or null",
        )


@dataclass(frozen=True)
class OptimConfig:
    """The schedule: one-cycle, with linear warm-up and cosine decay of the learning rates.

    Attributes:
        epochs: passes over the training images
        batch_size: images per step, of all processes together
        micro_batch: images in one forward pass: a larger batch is done in parts, whose gradients are added, to save
            memory; null: the whole batch at once
        warmup: share of all steps used for the warm-up
        final: learning rates at the end, as a fraction of the peak rates
        grad_clip: maximum norm of the whole gradient; null: no clipping
        class_balance: weight each class in the loss by the inverse of its number of images
        select: keep the weights of the epoch with the best validation AUC (best), or of the last epoch (last)
        batches: random; paired: a real image and its forgery (of one group) are in one batch; alternating: half of a
            batch is real and half of one forgery, and the forgeries take turns
        alignment: coefficient of the loss that draws the features of one class together on the unit sphere; 0: off
        uniformity: coefficient of the loss that spreads all features over the unit sphere; 0: off
    """

    epochs: int = 3
    batch_size: int = 16
    micro_batch: int | None = None
    warmup: float = 0.1
    final: float = 0.01
    grad_clip: float | None = 1.0
    class_balance: bool = False
    select: Literal["best", "last"] = "best"
    batches: Literal["random", "paired", "alternating"] = "random"
    alignment: float = 0.0
    uniformity: float = 0.0

    def __post_init__(self) -> None:
        _require(self.alignment >= 0, "optim.alignment", self.alignment, "0 or more")
        _require(self.uniformity >= 0, "optim.uniformity", self.uniformity, "0 or more")
        _require(self.epochs >= 1, "optim.epochs", self.epochs, "at least 1")
        _require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
        _require(
            self.micro_batch is None or self.micro_batch >= 1,
            "optim.micro_batch",
            self.micro_batch,
            "at least 1, or null",
        )
        _require(
            self.micro_batch is None or not (self.alignment or self.uniformity),
            "optim.micro_batch",
            self.micro_batch,
            "null with optim.alignment or optim.uniformity, which compare all images of a batch",
        )
        _require(0 <= self.warmup < 1, "optim.warmup", self.warmup, "a fraction of all steps in [0, 1)")
        _require(0 <= self.final <= 1, "optim.final", self.final, "a fraction of the peak rate in [0, 1]")
        _require(
            self.grad_clip is None or self.grad_clip > 0,
            "optim.grad_clip",
            self.grad_clip,
            "above 0, or null",
        )


@dataclass(frozen=True)
class RuntimeConfig:
    """Device, precision, processes and seed of a run.

    Attributes:
        device: cpu, cuda, one of several GPUs (cuda:0, cuda:1, ...), or auto: cuda if torch sees a GPU, else cpu
        precision: bf16 (autocast), fp16 (autocast; training scales the loss), fp32, or auto: bf16 if the device is fast
            at it, else fp32
        threads: threads of torch on the CPU; null: torch's own setting
        workers: processes that read the images; 0: the process that trains; null: 0 on the CPU, on CUDA one less than
            the usable cores, at most 16; no result depends on it
        seed: seed of new weights, order and augmentation of the images
        eval_batch_size: images in a batch of validation or scoring
        checkpoint_every: steps between checkpoints within an epoch; 0: only at the end of each epoch
        progress: show progress bars
        trackers: of a training run: where its numbers are also sent, e.g. [tensorboard], [wandb] or [trackio]
        track_every: steps between two entries of the training loss in the trackers
    """

    device: str = "auto"
    precision: Precision = "auto"
    threads: int | None = None
    workers: int | None = None
    seed: int = 0
    eval_batch_size: int = 32
    checkpoint_every: int = 200
    progress: bool = True
    trackers: list[str] = field(default_factory=list)
    track_every: int = 50

    def __post_init__(self) -> None:
        _require(self.threads is None or self.threads >= 1, "runtime.threads", self.threads, "at least 1, or null")
        _require(
            self.workers is None or self.workers >= 0,
            "runtime.workers",
            self.workers,
            "0 or more, or null for the default of the device",
        )
        _require(self.eval_batch_size >= 1, "runtime.eval_batch_size", self.eval_batch_size, "at least 1")
        _require(
            self.checkpoint_every >= 0,
            "runtime.checkpoint_every",
            self.checkpoint_every,
            "a number of steps (0: only at the end of each epoch)",
        )
        distinct = len(set(self.trackers)) == len(self.trackers)
        _require(distinct, "runtime.trackers", self.trackers, "a list of different names")
        _require(self.track_every >= 1, "runtime.track_every", self.track_every, "at least 1")


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.

    Attributes:
        data: the data sets and how their images are read
        model: the frozen backbone
        method: how it is adapted
        optim: the schedule
        runtime: device, precision, processes and seed
        out: the run folder to write
        resume: continue the interrupted run in out
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    method: MethodConfig = field(default_factory=MethodConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    out: str = "runs/masm"
    resume: bool = False

    def __post_init__(self) -> None:
        _require(bool(self.out), "out", self.out, "the run folder to write")
        masm = self.method.masm
        by_forgery = masm.mask_policy == "specialists" or masm.mask_statistic == "agreement"
        if self.method.name == "masm" and masm.mask_policy != "none" and by_forgery:
            _require(
                self.optim.batches == "alternating",
                "optim.batches",
                self.optim.batches,
                "alternating, because method.masm.mask_policy=specialists and method.masm.mask_statistic=agreement "
                "compare forgeries",
            )


@dataclass(frozen=True)
class EvalConfig:
    """Scores trained runs on data sets.

    Attributes:
        runs: run folders, as a list in a config file; on the command line name them without an option
        paths: DeepfakeBench JSON files, folders with real/ and fake-<method>/, or Hugging Face data sets (hf:FOLDER,
            hf:NAME)
        scores: score files with labels, of this or of another program; they need neither a run nor data
        out: the folder to write
        overwrite: replace the results that out already holds
        split: read this split only, e.g. test; null: all
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
        frames_per_video: number of frames kept per video, evenly spread; null: all
        as_is: do not compare how the images were cut with how the training images of the run were (crops.json)
        video_key: which frames form one video in the video metrics. correct: videos of different methods stay apart;
            dfb-compat: videos with the same name are merged, as in DeepfakeBench's code
        protocol: evaluate on the test sets of this protocol: a name that --list_protocols prints, or a YAML file of
            your own; it states data, split, compression, methods and frames per video
        data_root: with a protocol: the folder that holds its data sets, each as a JSON file or folder of its name
        parameters: with a protocol that has parameters: {name: value}
        other_training: with a protocol: evaluate a run that was not trained as the protocol requires, too; its results
            are marked
        runtime: device, precision, processes and seed
    """

    runs: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    scores: list[str] = field(default_factory=list)
    out: str = "eval"
    overwrite: bool = False
    split: str | None = None
    root: str | None = None
    prefix_map: dict[str, str] | None = None
    compression: str | None = None
    label_map: dict[str, int] | None = None
    video_pattern: str | None = None
    missing: Literal["error", "skip"] = "error"
    hf: HfConfig = field(default_factory=HfConfig)
    frames_per_video: int | None = None
    as_is: bool = False
    video_key: Literal["correct", "dfb-compat"] = "correct"
    protocol: str | None = None
    data_root: str | None = None
    parameters: dict[str, str] | None = None
    other_training: bool = False
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _require(bool(self.out), "out", self.out, "the folder to write")
        if self.protocol in ("correct", "dfb-compat"):
            raise ConfigError(
                f"protocol is {self.protocol!r}: this setting is now video_key (--video_key={self.protocol}); protocol "
                "is the name of an evaluation protocol (masm eval --list_protocols)"
            )
        given = [name for name in ("data_root", "parameters", "other_training") if getattr(self, name)]
        if given and self.protocol is None:
            raise ConfigError(f"{' and '.join(given)} can be given with a protocol only: name one with --protocol")
        if self.protocol is not None:
            stated = ("paths", "scores", "split", "compression", "label_map", "video_pattern", "frames_per_video")
            given = ["data" if name == "paths" else name for name in stated if getattr(self, name)]
            if given:
                raise ConfigError(
                    f"{' and '.join(given)} cannot be given with protocol, which states the data and how it is read, "
                    "and needs runs: leave out one or the other"
                )
            if self.data_root is None:
                raise ConfigError("protocol needs data_root: give the folder of the data sets with --data_root")
        _require(
            self.frames_per_video is None or self.frames_per_video >= 1,
            "frames_per_video",
            self.frames_per_video,
            "at least 1, or null for all",
        )
