"""Times layers with a frozen weight of 8 bits against the same layers in bfloat16, and measures a model's memory.

    python benchmarks/speed/quantized.py                                # results/quantized-cpu.json
    python benchmarks/speed/quantized.py --run RUN --pictures CROPS     # and what it changes in the logits of a run

Layers of N = D = 1024 with K = 2 subspaces of rank 8; M rows of activations in bfloat16. In each round every contender
does the same work once, in a random order, in one process. `bfloat16`: MASMLinear with its dense weight. `int8`,
`float8`: the same layer after masm_ext.quantize. `linear`, `torchao int8`: a frozen nn.Linear, dense, and with
torchao's own kernel for a weight of 8 bits. The memory is that of all parameters and buffers of the vision tower of
CLIP ViT-L/14, with random weights and converted attention. With `--run`, the logits of a trained run on crops are
compared with those after masm_ext.quantize, and with those of the same head on the backbone as it was before training.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import statistics
from machine import describe
from masm_detect.casework.files import find_files
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import Sample
from masm_detect.evaluation.predict import predict
from masm_detect.evaluation.runs import load_run
from masm_detect.results import write_json
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, quantize
from masm_ext.progress import Progress
from masm_ext.quantized_weight import held_tensors

RESULTS = Path(__file__).resolve().parent / "results"
WIDTH = 1024
CONFIG = MASMConfig(num_subspaces=2, subspace_rank=8)


def main() -> int:
    """The program; returns its exit code."""
    options = _parser().parse_args()
    device = torch.device(options.device)
    layers = contenders_of(device)
    result: dict[str, Any] = {"machine": describe(device), "shape": [WIDTH, WIDTH], "R": sum(CONFIG.ranks), "times": {}}
    with Progress(total=len(options.rows) * 2 * options.rounds * len(layers), desc="timing", unit="call") as bar:
        for rows in options.rows:
            for backward in (False, True):
                samples = measure(layers, rows, backward, options.rounds, device, bar)
                name = f"M = {rows}, {'forward and backward' if backward else 'forward'}"
                result["times"][name] = statistics(samples, "bfloat16")
    if not options.no_memory:
        result["memory"] = memory_of_clip()
    if options.run is not None:
        result["logits"] = logits_of_run(options.run, options.pictures)
    write_json(options.out, result)
    print(table(result))
    print(f"written: {options.out}")
    return 0


def contenders_of(device: torch.device) -> dict[str, nn.Module]:
    """Name -> layer; all have the same pretrained weight."""
    linear = nn.Linear(WIDTH, WIDTH).bfloat16().to(device).requires_grad_(False)
    layers: dict[str, nn.Module] = {"bfloat16": MASMLinear.from_linear(linear, CONFIG), "linear": linear}
    for format in ("int8", "float8"):
        model = nn.Sequential(copy.deepcopy(layers["bfloat16"]))
        quantize(model, format)
        layers[format] = model[0]
    from torchao.quantization import Int8Tensor, PerRow

    own = copy.deepcopy(linear)
    own.weight = nn.Parameter(Int8Tensor.from_hp(linear.weight.detach(), PerRow()), requires_grad=False)
    layers["torchao int8"] = own
    return layers


def measure(
    layers: dict[str, nn.Module], rows: int, backward: bool, rounds: int, device: torch.device, bar: Progress
) -> dict[str, list[float]]:
    """Seconds of each call, by contender."""
    x = torch.randn(rows, WIDTH, dtype=torch.bfloat16, device=device, requires_grad=backward)
    dy = torch.randn_like(x)

    def call(layer: nn.Module) -> Callable[[], Any]:
        def run() -> None:
            with torch.set_grad_enabled(backward):
                y = layer(x)
            if backward:
                torch.autograd.grad(y, [x, *(p for p in layer.parameters() if p.requires_grad)], dy)
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    calls = {name: call(layer) for name, layer in layers.items()}
    for run in calls.values():
        run()  # the first call chooses kernels
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            started = time.perf_counter()
            calls[name]()
            samples[name].append(time.perf_counter() - started)
            bar.update()
    return samples


def memory_of_clip() -> dict[str, Any]:
    """Bytes of all tensors of the converted vision tower of CLIP ViT-L/14, in bfloat16 and in each format."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    size = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    model = CLIPVisionModel(CLIPVisionConfig(**size, patch_size=14)).bfloat16()
    plain = _bytes(model)
    convert(model, CONFIG, target_modules=["q_proj", "k_proj", "v_proj", "out_proj"], use_cache=False)
    found = {"plain bfloat16": plain, "bfloat16": _bytes(model)}
    for format in ("int8", "float8"):
        quantised = copy.deepcopy(model)
        report = quantize(quantised, format)
        found[format] = _bytes(quantised)
        found[f"{format}, largest rounding"] = max(weight.error for weight in report.weights)
    return found


def logits_of_run(run: Path, pictures: Path) -> dict[str, Any]:
    """Changes of the logits of a run on the crops in a folder: by each format, and by what it learned."""
    config, detector = load_run(run)
    files = find_files([pictures])
    samples = [Sample(str(file), 0, "", "real", "") for file in files]
    dataset = frame_dataset(samples, detector.backbone, config.data)
    logits = predict(detector, dataset)
    found: dict[str, Any] = {"images": len(files), "method": config.method.name, "deviation": float(logits.std())}
    changes = {}
    for format in ("int8", "float8"):
        quantised = copy.deepcopy(detector)
        quantize(quantised, format, include=lambda name, _: name.startswith("backbone."))
        changes[format] = predict(quantised, dataset) - logits
    start = copy.deepcopy(detector)
    for layer in start.modules():
        if isinstance(layer, MASMLinear):
            for name in ("u", "s", "v"):
                getattr(layer, name).data.copy_(getattr(layer, f"{name}0"))
    changes["learned part of the backbone"] = logits - predict(start, dataset)
    for name, change in changes.items():
        found[name] = {"mean": float(change.abs().mean()), "largest": float(change.abs().max())}
    return found


def _bytes(model: nn.Module) -> int:
    parts = [part for tensor in (*model.parameters(), *model.buffers()) for part in held_tensors(tensor)]
    return sum(part.numel() * part.element_size() for part in parts)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    lines = []
    for name, entries in result["times"].items():
        ratios = ", ".join(f"{key} {entry['ratio']['median']:.2f}" for key, entry in entries.items())
        lines.append(f"{name}: {entries['bfloat16']['median'] * 1e3:.2f} ms; {ratios}")
    if memory := result.get("memory"):
        lines += [f"{name}: {value / 2**20:.0f} MiB" for name, value in memory.items() if isinstance(value, int)]
        lines.append(f"int8 / bfloat16: {memory['int8'] / memory['bfloat16']:.2f}")
    if logits := result.get("logits"):
        lines.append(f"logits of {logits['images']} crops, standard deviation {logits['deviation']:.3f}; changes:")
        for name, change in logits.items():
            if isinstance(change, dict):
                lines.append(f"  {name}: mean {change['mean']:.4f}, largest {change['largest']:.4f}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 257, 2056], help="rows of activations, M")
    parser.add_argument("--rounds", type=int, default=21, help="times that each contender runs")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--run", type=Path, help="run folder of masm, for the change of its logits")
    parser.add_argument("--pictures", type=Path, help="with --run: folder of crops")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of CLIP ViT-L/14")
    parser.add_argument("--out", type=Path, default=RESULTS / "quantized-cpu.json", help="the result")
    return parser


if __name__ == "__main__":
    sys.exit(main())
