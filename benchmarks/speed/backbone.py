"""Times each stage of one backbone at full size, with random weights: build, convert, train, save, load, merge.

    python benchmarks/speed/backbone.py                  # CLIP ViT-L/14; results/backbone-cpu.json

Nothing is compared: each stage runs once in one process (a training step several times), because at this size the
question is whether a machine can do it. Per stage: seconds, the peak of the process's memory during it, and the size of
its files. Weights are random, so the singular values are not those of a pretrained model; shapes and costs are.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from bench import load_average
from machine import describe
from masm_detect.config import MethodConfig
from masm_detect.methods.adapters import load_method, save_method
from masm_detect.methods.build import build_method
from masm_detect.models.backbone import Backbone
from masm_detect.models.detector import Detector
from masm_detect.results import write_json
from masm_detect.runtime import choose_attention
from peak_memory import peak_bytes, reset_peak
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as bce

from masm_ext import MASMLinear, merge
from masm_ext.progress import Progress
from masm_ext.wrappers import modules_of

RESULTS = Path(__file__).resolve().parent / "results"
CPU = torch.device("cpu")
#: Sizes of the image tower of CLIP ViT-L/14 (openai/clip-vit-large-patch14), and a tiny one for tests.
MODELS = {
    "clip-vit-l14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "image_size": 224, "projection_dim": 768,
    },
    "tiny": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "patch_size": 14, "image_size": 28, "projection_dim": 16,
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """The program; returns its exit code."""
    options = _parser().parse_args(arguments)
    before = load_average()
    _detector("tiny")  # imports what transformers loads when it is used first
    with tempfile.TemporaryDirectory(prefix="masm-backbone-") as folder:
        os.environ["XDG_CACHE_HOME"] = folder  # an SVD from the cache would be no conversion
        stages = measure(options.model, options.steps, Path(folder), options.progress)
    result = {
        "machine": describe(CPU),
        "threads": torch.get_num_threads(),
        # the load is that of the whole machine, this process included
        "load_average": {"before": before, "after": load_average()},
        "model": options.model,
        "sizes": MODELS[options.model],
        "method": "masm, with the defaults of masm train: the attention layers",
        "dtype": "float32",
        "batch": 1,
        "stages": stages,
    }
    write_json(options.out, result)
    print(table(result))
    print(f"written: {options.out}")
    return 0


class Stages:
    """Stage -> seconds, peak_bytes, and what else is known of it, in `found`."""

    def __init__(self, name: str, progress: bool):
        self.found: dict[str, dict[str, Any]] = {}
        self.bar = Progress(total=7, desc=name, unit="stage", disable=not progress)

    def run(self, name: str, call: Callable[[], Any], repeats: int = 1) -> Any:
        """The last result of `call`, called and measured `repeats` times."""
        counter, seconds, value = reset_peak(CPU), [], None
        for _ in range(repeats):
            started = time.perf_counter()
            value = call()
            seconds.append(time.perf_counter() - started)
        self.found[name] = {"seconds": statistics.median(seconds), "repeats": repeats}
        self.found[name] |= {"peak_bytes": peak_bytes(CPU), "peak_counter": counter}
        self.bar.update()
        return value


def measure(name: str, steps: int, folder: Path, progress: bool = True) -> dict[str, dict[str, Any]]:
    """`Stages.found` of the backbone `name` (a key of `MODELS`), in the order of the stages.

    Args:
        name: of the backbone.
        steps: training steps; the first is a stage of its own, for it makes the optimizer's memory.
        folder: for the adapter.
        progress: show a progress bar.
    """
    stages = Stages(name, progress)
    pixels = torch.randn(1, 3, *[MODELS[name]["image_size"]] * 2)
    expected = _train(stages, name, steps, folder, pixels)
    # the trained model is gone by now: a user who loads an adapter does not hold it
    torch.manual_seed(0)
    loaded = _detector(name)
    stages.run("load adapter", lambda: load_method(loaded, MethodConfig(), folder / "adapter"))
    loaded.eval()
    with torch.no_grad():
        stages.found["load adapter"]["feature_difference"] = float((loaded.backbone(pixels) - expected).abs().max())
        stages.run("merge", lambda: merge(loaded, keep=False))
        stages.found["merge"]["feature_difference"] = float((loaded.backbone(pixels) - expected).abs().max())
    stages.bar.close()
    return stages.found


def _train(stages: Stages, name: str, steps: int, folder: Path, pixels: Tensor) -> Tensor:
    """All stages until the adapter is saved; returns the features [1, D] of the trained model."""
    method, label = MethodConfig(), torch.ones(1)
    torch.manual_seed(0)
    detector = stages.run("build", lambda: _detector(name))
    stages.found["build"]["parameters"] = sum(p.numel() for p in detector.parameters())
    adapted = stages.run("convert", lambda: build_method("masm", detector, method, seed=0))
    count = len(modules_of(detector, MASMLinear))
    stages.found["convert"] |= {"layers": count, "trainable_parameters": adapted.trainable_parameters}

    def step() -> None:
        adapted.optimizer.zero_grad()
        bce(detector(pixels), label).backward()
        adapted.optimizer.step()

    detector.train()
    stages.run("first step", step)
    stages.run("step", step, steps)
    detector.eval()
    stages.run("save adapter", lambda: save_method(detector, adapted, method, folder / "adapter", base=""))
    size = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
    stages.found["save adapter"]["file_bytes"] = size
    with torch.no_grad():
        return detector.backbone(pixels)


def table(result: dict[str, Any]) -> str:
    """The stages as a table in Markdown."""
    lines = ["| stage | seconds | peak memory of the process, GiB |", "|---|---|---|"]
    for name, entry in result["stages"].items():
        lines.append(f"| {name} | {entry['seconds']:.1f} | {entry['peak_bytes'] / 2**30:.1f} |")
    return "\n".join(lines)


def _detector(name: str) -> Detector:
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**MODELS[name]))
    detector = Detector(Backbone(model))
    choose_attention(detector.backbone, CPU)
    return detector


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=list(MODELS), default="clip-vit-l14", help="sizes of the backbone")
    parser.add_argument("--steps", type=int, default=3, help="training steps after the first; the median counts")
    parser.add_argument("--progress", action=argparse.BooleanOptionalAction, default=True, help="show a progress bar")
    parser.add_argument("--out", type=Path, default=RESULTS / "backbone-cpu.json", help="the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
