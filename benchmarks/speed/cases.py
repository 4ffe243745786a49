"""What is measured: shapes, model sizes and goals. Data only; how it is measured is in `bench.py` and `suites/`.

Letters as in docs/method.md: M tokens, D in_features, N out_features, K subspaces of together R directions.
A goal is the largest ratio over the baseline (median of the per-round ratios) that counts as met.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SUITES = ("layer", "group", "step", "memory", "optimizer", "losses", "decompose", "scale")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SUBSPACES = 4
#: Measures of a layer, and of how much of another provider's time masm needs.
FORWARD, BOTH = "forward", "forward+backward"


def over(measure: str, provider: str) -> str:
    return f"{measure} over {provider}"


@dataclass(frozen=True)
class Defaults:
    """The default settings of a run. `tokens` of a layer: 8 images of 257 on a CPU, 32 on a GPU. `model_dtypes` and
    `converted` apply to whole models. `left_out`: providers that run only if `--providers` names them. On a CPU a group
    equals its layers; on a GPU compiling, or an SVD of each layer, would take longer than all measurements together.
    `minutes`: a run starts no case whose estimated end is later.
    """

    tokens: int
    model: str
    batch: int
    seconds: float
    model_dtypes: tuple[str, ...]
    converted: str
    left_out: tuple[str, ...]
    minutes: float | None = None


DEFAULTS = {
    "cpu": Defaults(2056, "vit-s", 16, 12.0, ("float32", "bfloat16"), "all linears", ("masm-group",)),
    "cuda": Defaults(
        *(8224, "vit-l", 32, 1.5, ("bfloat16",), "attention"),
        left_out=("masm-half", "compiled", "peft-pissa", "peft-osf", "eigentune"),
        minutes=8.0,
    ),
}


@dataclass(frozen=True)
class Options:
    """The settings of a run; `DEFAULTS` of the device for what is not given. `model_dtypes`: of the suites that take
    a whole model; `seconds`: time budget of one comparison; `cache`: a folder for the SVDs of the run.
    """

    device: str = "cpu"
    threads: int | None = None
    dtypes: tuple[str, ...] = tuple(DTYPES)
    model_dtypes: tuple[str, ...] = ()
    providers: tuple[str, ...] | None = None
    model: str = ""
    batch: int = 0
    seconds: float = 0.0
    quick: bool = False
    dry_run: bool = False
    progress: bool = False
    cache: Path | None = None

    def __post_init__(self) -> None:
        defaults = self.defaults
        for name in ("model", "batch", "seconds", "model_dtypes"):
            if not getattr(self, name):
                object.__setattr__(self, name, getattr(defaults, name))

    @property
    def on_gpu(self) -> bool:
        return self.device.partition(":")[0] == "cuda"

    @property
    def defaults(self) -> Defaults:
        return DEFAULTS["cuda" if self.on_gpu else "cpu"]

    @property
    def compile_seconds(self) -> float:
        """A guess: until the kernels of one dtype and R are compiled, and their tiles timed, for all strategies."""
        return 30.0 if self.on_gpu else 0.0

    def chosen(self, available: tuple[str, ...], baseline: str | None = None) -> list[str]:
        """Those of `available` that the run asks for, the baseline always among them and first."""
        wanted = [name for name in available if self.providers is None or name in self.providers]
        return wanted if baseline is None else [baseline, *(name for name in wanted if name != baseline)]


@dataclass(frozen=True)
class Case:
    """One comparison. `goals`: {(measure, provider): largest ratio over the baseline}. `estimate`: about how
    many seconds it takes, with kernels compiled anew."""

    suite: str
    name: str
    dtype: str
    baseline: str
    values: dict[str, Any]
    goals: dict[tuple[str, str], float] = field(default_factory=dict)
    estimate: float = 0.0

    @property
    def key(self) -> str:
        return f"{self.suite}/{self.dtype}/{self.name}"


@dataclass(frozen=True)
class VisionSize:
    """A DINOv2 vision transformer. `tokens` of one image: one a patch of 14 x 14, and the class token."""

    width: int
    depth: int
    heads: int
    image: int = 224

    @property
    def tokens(self) -> int:
        return (self.image // 14) ** 2 + 1

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(N, D) of every linear layer: query, key, value, output, and the two of the MLP."""
        w = self.width
        return [*[(w, w)] * 4, (4 * w, w), (w, 4 * w)] * self.depth

    @property
    def attention(self) -> list[tuple[int, int]]:
        """(N, D) of the attention projections."""
        return [(self.width, self.width)] * (4 * self.depth)

    def converted(self, which: str) -> list[tuple[int, int]]:
        """(N, D) of what is converted: "all linears" or "attention"."""
        return self.linears if which == "all linears" else self.attention


MODELS = {
    "tiny": VisionSize(64, 2, 2, 28),
    "vit-s": VisionSize(384, 12, 6),
    "vit-b": VisionSize(768, 12, 12),
    "vit-l": VisionSize(1024, 24, 16),
    "vit-h": VisionSize(1280, 32, 16),
}


@dataclass(frozen=True)
class LayerCase:
    """M = 0: the tokens of the device."""

    dtype: str
    N: int
    D: int
    R: int
    goals: dict[tuple[str, str], float] = field(default_factory=dict)
    M: int = 0


def _cpu_goals(both: float | None) -> dict[tuple[str, str], float]:
    masked = {(BOTH, "masm-masked"): 1.03}
    return masked if both is None else {(BOTH, "masm"): both, **masked}


def _gpu_goals(forward: float, both: float) -> dict[tuple[str, str], float]:
    faster = {(over(BOTH, name), "masm"): 1 / gain for name, gain in (("effort", 1.4), ("peft-lora", 1.2))}
    return {(FORWARD, "masm"): forward, (BOTH, "masm"): both, **faster}


#: A few rows, forward: over a dense product and two skinny ones, a launch each.
SMALL_BATCH_GOALS = {(over(FORWARD, "reference"), "masm"): 1 / 1.8}
LAYERS = {
    "cpu": (
        LayerCase("float32", 1024, 1024, 16, _cpu_goals(1.08)),
        LayerCase("float32", 4096, 1024, 16, _cpu_goals(1.08)),
        LayerCase("float32", 1024, 4096, 16, _cpu_goals(None)),
        LayerCase("float32", 1024, 1024, 64, _cpu_goals(1.18)),
        LayerCase("bfloat16", 1024, 1024, 16, _cpu_goals(1.25)),
        LayerCase("bfloat16", 4096, 1024, 16, _cpu_goals(1.20)),
        LayerCase("bfloat16", 1024, 1024, 64, _cpu_goals(None)),
    ),
    "cuda": (
        LayerCase("bfloat16", 1024, 1024, 16, _gpu_goals(1.12, 1.50)),
        LayerCase("bfloat16", 4096, 1024, 16, _gpu_goals(1.06, 1.27)),
        LayerCase("bfloat16", 1024, 4096, 16, _gpu_goals(1.10, 1.30)),
        LayerCase("bfloat16", 1024, 1024, 64),
        *(LayerCase("bfloat16", N, 1024, 16, SMALL_BATCH_GOALS, M) for N in (1024, 4096) for M in (16, 1)),
    ),
}
#: (dtype, N, D, R) of three layers on one x.
GROUPS = (("float32", 1024, 1024, 16), ("bfloat16", 1024, 1024, 16))
#: masm over the frozen step, by device and dtype; on a GPU also over the step of Effort, in time and in memory.
STEP_GOALS = {("cpu", "float32"): 1.10, ("cpu", "bfloat16"): 1.12, ("cuda", "bfloat16"): 1.10}
STEP_OVER_EFFORT = 1 / 1.3
MEMORY_GOAL = 1.05
MEMORY_OVER_EFFORT = 0.8
#: masked AdamW over torch's fused AdamW; and how many times faster than the loop a user would write it must be.
OPTIMIZER_GOALS = {"cpu": (1.2, 3.0), "cuda": (1.1, 5.0)}
#: (N, D) and R of layers whose moments take 1 GiB: the step at the pace of memory (goal on a GPU: 80% of a copy).
GIBIBYTE = ([(4096, 4096)] * 64, 256)
#: seconds to load an adapter of the attention layers of ViT-L.
LOAD_GOAL = 1.0
#: largest distance of a point from its straight line, over the point, that still counts as straight.
STRAIGHT = 0.10
