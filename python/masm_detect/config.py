"""Settings of a run: frozen dataclasses, checked when made, read and overridden by jsonargparse (`commands/main.py`).

Their docstrings are the help texts of `masm <command> --help`. A function takes the dataclass it needs; only
`training.run.train`, which is the whole run, takes all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .errors import UserError
from .methods.registry import METHODS

MethodName = Literal[tuple(METHODS)]
Precision = Literal["auto", "bf16", "fp32"]


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message has its name, its value and what is allowed."""


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


@dataclass(frozen=True)
class AugmentConfig:
    """Training augmentation. Probabilities are per image, 0: off; ranges are [low, high], drawn uniformly.

    Attributes:
        flip: probability of mirroring left-right
        jpeg: probability of a JPEG recompression
        jpeg_quality: range of its quality, 1 to 100
        blur: probability of a Gaussian blur
        blur_sigma: range of its sigma in pixels
        brightness_contrast: probability of pixels * (1 + c) + 255 b
        brightness_contrast_limit: b and c are drawn from plus and minus this
        noise: probability of Gaussian noise
        noise_sigma: range of its standard deviation, of 0 to 255
        downscale: probability of resizing to less and back
        downscale_factor: range of the factor
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
class DataConfig:
    """Where the images are and how they are read.

    Attributes:
        paths: DeepfakeBench JSON files, or folders with real/ and fake-<method>/: one, or a list [a, b]
        methods: keep only these forgery methods (one, or a list), and all real samples; null: all
        splits: read only these splits (one, or a list), e.g. train of a file whose val repeats the test videos; null:
            all
        root: for JSON files: the folder of relative frame paths; null: the folder of the file
        prefix_map: for JSON files: {prefix of a path in the file: prefix here}, applied before root; the longest match
            wins
        compression: for JSON files: c23, c40, ... if the file has several; null: the only one
        label_map: for JSON files: {label in the file: 0 (real) or 1 (fake)}, used before the known label names; null:
            known names only
        missing: for JSON files: a frame that does not exist is an error, or is skipped, with a warning that counts them
        val_fraction: share of the groups (videos, pairs, photographs) that validates, in a data set without a
            validation split; samples that carry a split keep it
        split_seed: seed that chooses these groups
        frames_per_video: number of evenly spread frames kept of each video; null: all
        crop: resize the whole image, or cut out the center without resampling
        normalize_first: [side, JPEG quality]: first resize and recompress every image in the same way, for sets whose
            classes differ in size or format; null: do not
        augment: random changes of the images in training; null: none
    """

    paths: list[str] | str = field(default_factory=list)
    methods: list[str] | str | None = None
    splits: list[str] | str | None = None
    root: str | None = None
    prefix_map: dict[str, str] | None = None
    compression: str | None = None
    label_map: dict[str, int] | None = None
    missing: Literal["error", "skip"] = "error"
    val_fraction: float = 0.2
    split_seed: int = 0
    frames_per_video: int | None = None
    crop: Literal["resize", "center"] = "resize"
    normalize_first: tuple[int, int] | None = None
    augment: AugmentConfig | None = field(default_factory=AugmentConfig)

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


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone.

    Attributes:
        backbone: a hub id, a local folder in the layout of Hugging Face, or bundled:dinov2-small
        image_size: input side in pixels, a multiple of the patch size; null: the model's own (224 for DINOv2)
        pool: the feature of an image: cls (class token after the final norm), mean (of the patches), pooler (the
            model's own head) or auto (cls; pooler for SigLIP; mean without a class token)
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
class MasmOptions:
    """The subspaces, losses and masks of masm, as in `masm_ext.MASMConfig`.

    Attributes:
        num_subspaces: K, the number of artifact subspaces of a layer
        subspace_rank: rank of each subspace: one number, or a list of K; ignored if energy is given
        energy: in (0, 1): the rank of a layer is the smallest whose trailing singular directions hold this share of its
            squared Frobenius norm, rounded up to a multiple of K; null: subspace_rank
        directions: which singular directions of a weight are trained: trailing those of the smallest singular values,
            leading those of the largest, random a draw
        partition: interleaved assigns the trailing directions round robin, so that each subspace spans the same share
            of the spectrum; contiguous assigns consecutive directions
        orthogonality: coefficient of the penalty that keeps the subspaces orthonormal, and apart from each other and
            from the frozen part; applied beside the step, as weight decay is; 0: off
        spectral_consistency: coefficient of the penalty that keeps the norm of a layer and the singular values of its
            subspaces; 0: off
        mask_policy: which layers a subspace may update: bias_variance selects them repeatedly during training, static
            once before it, none allows all
        mask_warmup: steps before the first selection, all blocks (one subspace of one layer each) active
        mask_interval: steps between selections
        mask_decay: decay of the running averages that selections are based on
        mask_active_fraction: share of the layers that each subspace may update
        mask_threshold: a block is active if the signal-to-power ratio of its gradient is above this (1: all steps
            agree, 0: noise); null: the best mask_active_fraction are active
        mask_hysteresis: relative advantage of a block that is already active, which keeps masks from flickering
        mask_min_active: least number of layers that stay active for each subspace
        mask_probe_interval: steps after which a masked block is unmasked to update its statistics; 0: never
        mask_probe_steps: steps for which such a block then stays unmasked
        mask_calibration_batches: batches on which the static policy chooses
    """

    num_subspaces: int = 3
    subspace_rank: int | list[int] = 4
    energy: float | None = None
    directions: str = "trailing"
    partition: str = "interleaved"
    orthogonality: float = 1e-2
    spectral_consistency: float = 1e-3
    mask_policy: str = "bias_variance"
    mask_warmup: int = 20
    mask_interval: int = 10
    mask_decay: float = 0.98
    mask_active_fraction: float = 0.5
    mask_threshold: float | None = None
    mask_hysteresis: float = 0.1
    mask_min_active: int = 4
    mask_probe_interval: int = 40
    mask_probe_steps: int = 5
    mask_calibration_batches: int = 8


@dataclass(frozen=True)
class MethodConfig:
    """How the backbone is adapted.

    Attributes:
        name: probe trains the classifier only, full everything; the others adapt the layers in targets; masm-nomask is
            masm without masks
        targets: the linear layers that are adapted: those of the attention, or those of the MLPs too
        rank: LoRA's r, or the number of trained singular directions of osf and effort (masm: masm.subspace_rank);
            null: 8 for lora, 12 for osf, 1 for effort
        lr: peak learning rate of the adapter (full: of the whole backbone); null: 3e-05 for full, 0.001 for the others
        s_lr: peak learning rate of the singular values in masm and masm-nomask; null: 0.005
        head_lr: peak learning rate of the classifier; null: 0.003
        weight_decay: weight decay of AdamW; null: 0.01
        masm: subspaces, penalties and masks of masm and masm-nomask
    """

    name: MethodName = "masm"
    targets: Literal["attention", "attention+mlp"] = "attention"
    rank: int | None = None
    lr: float | None = None
    s_lr: float | None = None
    head_lr: float | None = None
    weight_decay: float | None = None
    masm: MasmOptions = field(default_factory=MasmOptions)

    def __post_init__(self) -> None:
        _require(self.name in METHODS, "method.name", self.name, f"one of {', '.join(METHODS)}")
        _require(
            self.rank is None or self.rank >= 1,
            "method.rank",
            self.rank,
            "at least 1, or null for the default",
        )
        for name in ("lr", "s_lr", "head_lr"):
            rate = getattr(self, name)
            _require(rate is None or rate > 0, f"method.{name}", rate, "greater than 0, or null for the default")


@dataclass(frozen=True)
class OptimConfig:
    """The schedule: one-cycle, a linear rise of the rates, then a cosine fall.

    Attributes:
        epochs: passes over the training images
        batch_size: images in a step
        warmup: share of all steps in which the rates rise
        final: share of the peak rates to which they fall
        grad_clip: largest norm of the gradient of all weights together; null: not clipped
        class_balance: weight real and fake images in the loss inversely to their number
        select: keep the weights of the epoch with the best AUC on validation, or those of the last one
    """

    epochs: int = 3
    batch_size: int = 16
    warmup: float = 0.1
    final: float = 0.01
    grad_clip: float | None = 1.0
    class_balance: bool = False
    select: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        _require(self.epochs >= 1, "optim.epochs", self.epochs, "at least 1")
        _require(self.batch_size >= 1, "optim.batch_size", self.batch_size, "at least 1")
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
        precision: bf16 (autocast), fp32, or auto: bf16 if the device has it natively, else fp32
        threads: threads of torch on the CPU; null: torch's own setting
        workers: processes that read the images; 0: the process that trains; null: 0 on the CPU, on CUDA one less than
            the usable cores, at most 16; no result depends on it
        seed: seed of new weights, order and augmentation of the images
        eval_batch_size: images in a batch of validation or scoring
        checkpoint_every: steps between checkpoints within an epoch; 0: only at its end
        progress: show progress bars
    """

    device: str = "auto"
    precision: Precision = "auto"
    threads: int | None = None
    workers: int | None = None
    seed: int = 0
    eval_batch_size: int = 32
    checkpoint_every: int = 200
    progress: bool = True

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


@dataclass(frozen=True)
class TrainConfig:
    """A training run: everything that its weights depend on, and its output folder.

    Attributes:
        data: the data sets and how their images are read
        model: the frozen backbone
        method: how it is adapted
        optim: the schedule
        runtime: the machine
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


@dataclass(frozen=True)
class EvalConfig:
    """Scores trained runs on data sets.

    Attributes:
        runs: run folders written by `masm train`
        paths: DeepfakeBench JSON files, or folders with real/ and fake-<method>/
        out: the folder to write
        overwrite: replace the results that out already holds
        split: read this split only, e.g. test; null: all
        root: for JSON files: the folder of relative frame paths; null: the folder of the file
        prefix_map: for JSON files: {prefix of a path in the file: prefix here}, applied before root; the longest match
            wins
        compression: for JSON files: c23, c40, ... if the file has several; null: the only one
        label_map: for JSON files: {label in the file: 0 (real) or 1 (fake)}, used before the known label names; null:
            known names only
        missing: for JSON files: a frame that does not exist is an error, or is skipped, with a warning that counts them
        frames_per_video: number of evenly spread frames kept of each video; null: all
        protocol: identity of a video in the video metrics: correct keeps videos of different methods apart, dfb-compat
            merges those of one name, as DeepfakeBench's code does
        runtime: the machine
    """

    runs: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    out: str = "eval"
    overwrite: bool = False
    split: str | None = None
    root: str | None = None
    prefix_map: dict[str, str] | None = None
    compression: str | None = None
    label_map: dict[str, int] | None = None
    missing: Literal["error", "skip"] = "error"
    frames_per_video: int | None = None
    protocol: Literal["correct", "dfb-compat"] = "correct"
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _require(bool(self.out), "out", self.out, "the folder to write")
        _require(
            self.frames_per_video is None or self.frames_per_video >= 1,
            "frames_per_video",
            self.frames_per_video,
            "at least 1, or null for all",
        )
