"""What a run is told: plain frozen dataclasses, checked when made, read and overridden by jsonargparse (`cli.py`).

Each part of the program takes the dataclass it needs and nothing takes all of them, except `train.train`, which is
the run.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from .data.images import AugmentConfig
from .errors import UserError

METHODS = ("probe", "full", "lora", "osf", "effort", "masm-nomask", "masm")
MethodName = Literal["probe", "full", "lora", "osf", "effort", "masm-nomask", "masm"]
Precision = Literal["auto", "bf16", "fp32"]


class ConfigError(UserError, ValueError):
    """A setting that cannot work; the message names it, says what arrived and what is allowed."""


def _require(condition: bool, name: str, value: Any, allowed: str) -> None:
    if not condition:
        raise ConfigError(f"{name} is {value!r}; it must be {allowed}")


@dataclass(frozen=True)
class DataConfig:
    """Where the images are and how they are read.

    `paths`: DeepfakeBench JSON files or folders with `real/` and `fake-<method>/`. `splits` reads only these splits
    (null: all), e.g. ["train"] of a file whose "val" repeats the test videos. Samples that carry a split keep it; a
    data set without a validation split gives `val_fraction` of its groups (videos, pairs, photographs) to validation,
    chosen by `split_seed`. `methods` keeps only these forgery methods (all real samples stay). `root`, `prefix_map`,
    `compression`, `label_map` and `missing` are those of `data.records.read_deepfakebench`, for JSON files.
    `frames_per_video` keeps that many evenly spread frames of each video. `crop`, `normalize_first` (side, JPEG
    quality) and `augment` (training only; null: none) are those of `data.images.ImageTransform`.
    """

    paths: list[str] = field(default_factory=list)
    methods: list[str] | None = None
    splits: list[str] | None = None
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
        _require(0 < self.val_fraction < 1, "data.val_fraction", self.val_fraction, "between 0 and 1, e.g. 0.2")
        _require(
            self.frames_per_video is None or self.frames_per_video >= 1,
            "data.frames_per_video",
            self.frames_per_video,
            "at least 1, or null for all",
        )


@dataclass(frozen=True)
class ModelConfig:
    """The frozen backbone: a hub id, a local folder or `bundled:dinov2-small`."""

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
    """The fields of `masm_ext.MASMConfig` that a run may set; see there for their meaning."""

    num_subspaces: int = 3
    subspace_rank: int | list[int] = 4
    energy: float | None = None
    partition: Literal["interleaved", "contiguous"] = "interleaved"
    orthogonality: float = 1e-2
    spectral_consistency: float = 1e-3
    mask_policy: Literal["bias_variance", "static", "none"] = "bias_variance"
    mask_warmup: int = 20
    mask_interval: int = 10
    mask_active_fraction: float = 0.5
    mask_threshold: float | None = None
    mask_hysteresis: float = 0.1
    mask_min_active: int = 4
    mask_probe_interval: int = 40
    mask_probe_steps: int = 5
    mask_calibration_batches: int = 8


@dataclass(frozen=True)
class MethodConfig:
    """How the backbone is adapted. A rate that is null takes the default of the method (`methods.DEFAULTS`).

    `rank` is LoRA's r, or the number of trained singular directions of osf and effort; masm has its own ranks in
    `masm`. `lr` is the rate of the adapter (of the whole backbone for "full"), `head_lr` that of the classifier,
    `s_lr` that of the singular values in masm.
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
    """The schedule: one-cycle, a linear rise over `warmup` of all steps, then a cosine fall to `final` of the peak
    rate.
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
    """The machine's side of a run. `precision: auto` is bf16 autocast where the device has it natively, else fp32.
    `workers` processes read the images (0: the process that trains; null: 0 on the CPU, else one less than there are
    cores, at most 16); no result depends on them.
    """

    device: str = "cpu"
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
    """A training run: everything that its weights depend on, and the folder it writes to."""

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
    """Scores trained runs on data sets. `runs`: run folders; `split`: read this split only, e.g. test; the options of
    the data are those of `DataConfig`.
    """

    runs: list[str] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    out: str = "eval"
    split: str | None = None
    root: str | None = None
    prefix_map: dict[str, str] | None = None
    compression: str | None = None
    label_map: dict[str, int] | None = None
    missing: Literal["error", "skip"] = "error"
    frames_per_video: int | None = None
    n_bootstrap: int = 1000
    protocol: Literal["correct", "dfb-compat"] = "correct"
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)

    def __post_init__(self) -> None:
        _require(self.n_bootstrap >= 0, "n_bootstrap", self.n_bootstrap, "0 or more")
        _require(bool(self.out), "out", self.out, "the folder to write")
        _require(
            self.frames_per_video is None or self.frames_per_video >= 1,
            "frames_per_video",
            self.frames_per_video,
            "at least 1, or null for all",
        )


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts and lists, as it is saved with a run."""
    return asdict(config)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write `config` as YAML, atomically."""
    import yaml

    from .results import write_text

    write_text(path, yaml.safe_dump(_plain(to_dict(config)), sort_keys=False))


def load_config(path: Path) -> TrainConfig:
    """Read a saved run's config.yaml; unknown or wrongly typed keys raise `ConfigError`."""
    import yaml
    from jsonargparse import ArgumentParser

    if not path.is_file():
        raise ConfigError(f"{path} does not exist: is {path.parent} a run folder written by `masm train`?")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainConfig)
    try:
        content = yaml.safe_load(path.read_text())
        if isinstance(content.get("data"), dict):
            content["data"].pop("workers", None)  # of runs of 0.1.0: now runtime.workers, and no result depends on it
        return TrainConfig(**vars(parser.instantiate(parser.parse_object(content))))
    except Exception as error:
        raise ConfigError(f"{path} is not a valid run configuration: {error}") from error


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value
