"""The gradients and the first steps of DINOv2-S with artifact subspaces: figures that docs/method.md refers to.

    python benchmarks/generalization/first_steps.py

Photographs of scikit-image and scikit-learn, cut into tiles of 112 px; of each batch of eight, half are forged
(`upsample`). The layers are the query, key and value projections, with three subspaces of rank 4, at the rates that
`masm train` has by default. A minute in all. Writes `results/first_steps.json`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from masm_detect.data.demo_set import PHOTOGRAPHS, load_photograph
from masm_detect.data.forgeries import forge
from masm_detect.models.bundled import load_bundled_dinov2
from masm_detect.results import write_json
from runner import made_by
from torch import Tensor

from masm_ext import MaskedAdamW, MASMConfig, convert, regularization_loss, scale_free_groups
from masm_ext.nn.masm_linear import masm_layers

TILE, BATCH, STEPS, RANK = 112, 8, 5, 12
PENALTIES = {"orthogonality": 1e-2, "spectral_consistency": 1e-3}
TARGETS = ["query", "key", "value", "q_proj", "k_proj", "v_proj"]
Batch = tuple[Tensor, Tensor]


def batches(count: int) -> list[Batch]:
    """Images [8, 3, 112, 112] and labels [8], 1 = forged."""
    rng = np.random.default_rng(0)
    photographs = [load_photograph(*one) for one in PHOTOGRAPHS["train"]]
    photographs = [one for one in photographs if min(one.shape[:2]) > TILE]
    made = []
    for _ in range(count):
        tiles = []
        for label in range(BATCH):
            photograph = photographs[rng.integers(len(photographs))]
            top, left = (int(rng.integers(side - TILE)) for side in photograph.shape[:2])
            tile = np.ascontiguousarray(photograph[top : top + TILE, left : left + TILE])
            tiles.append(forge("upsample", tile, rng)[0] if label % 2 else tile)
        images = torch.from_numpy(np.stack(tiles)).permute(0, 3, 1, 2).float() / 255
        made.append(((images - 0.45) / 0.23, (torch.arange(BATCH) % 2).float()))
    return made


def model_and_config(**settings: Any) -> tuple[torch.nn.ModuleDict, MASMConfig]:
    """DINOv2-S with a new head, and a config with `settings`; not yet converted."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"vit": load_bundled_dinov2(), "head": torch.nn.Linear(384, 1)})
    config = MASMConfig(target_modules=TARGETS, modules_to_save="head", mask_policy="none", **settings)
    return model, config


def loss(model: torch.nn.ModuleDict, batch: Batch) -> Tensor:
    """Cross-entropy of a batch."""
    logits = model["head"](model["vit"](batch[0]).pooler_output)[:, 0]
    return F.binary_cross_entropy_with_logits(logits, batch[1])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and largest of some figures, one a layer or block."""
    found = {"median": np.median(values), "least": np.min(values), "largest": np.max(values)}
    return {name: float(f"{value:.3g}") for name, value in found.items()}


def beside_lora(batch: Batch) -> dict[str, Any]:
    """Trailing singular values, and the first gradient of u beside that of LoRA's B."""
    model, _ = model_and_config()
    layers = {name: module for name, module in model["vit"].named_modules() if name.split(".")[-1] in TARGETS}
    for module in layers.values():
        module.weight.requires_grad_(True)
    gradients = torch.autograd.grad(loss(model, batch), [module.weight for module in layers.values()])
    first, last, ratios = [], [], []
    for (name, module), gradient in zip(layers.items(), gradients):
        _, s, vh = torch.linalg.svd(module.weight.detach().double())
        if name.split(".")[-1] in ("query", "q_proj"):
            first.append(float(s[-16]))
            last.append(float(s[-1]))
        bound = module.in_features**-0.5
        down = torch.empty(8, module.in_features, dtype=torch.float64).uniform_(-bound, bound)  # PEFT's start of A
        of_u = s[-RANK:, None] * (vh[-RANK:] @ gradient.double().T)
        ratios.append(float((gradient.double() @ down.T).square().mean().sqrt() / of_u.square().mean().sqrt()))
    return {
        "query: singular value 16 from the end": spread(first),
        "query: last singular value": spread(last),
        "gradient of LoRA's B over that of u, root mean squares": spread(ratios),
    }


def first_steps(lift: float, data: Sequence[Batch]) -> dict[str, Any]:
    """What STEPS steps do to the directions and the weights."""
    model, config = model_and_config(lift=lift)
    convert(model, config, progress=False)
    layers = list(masm_layers(model).values())
    start = {name: [getattr(layer, name).detach().clone() for layer in layers] for name in ("u", "v")}
    optimizer = MaskedAdamW(scale_free_groups(model))
    in_s: list[float] = []
    for step in range(STEPS):
        loss(model, data[step]).backward()
        if step == 0:
            for layer in layers:
                for a, b in zip(layer.offsets, layer.offsets[1:]):
                    squares = [float(p.grad[a:b].square().sum()) for p in (layer.s, layer.u, layer.v)]
                    in_s.append(squares[0] / sum(squares))
        optimizer.step()
        optimizer.zero_grad()
    turned = {
        name: [float((getattr(layer, name).detach() - a).norm(dim=1).mean()) for layer, a in zip(layers, before)]
        for name, before in start.items()
    }
    return {
        "share of s in the squared gradient of a block": spread(in_s),
        f"turn of u's rows in {STEPS} steps": spread(turned["u"]),
        f"turn of v's rows in {STEPS} steps": spread(turned["v"]),
        f"||dW|| / ||W|| after {STEPS} steps": spread([layer.relative_update() for layer in layers]),
    }


def penalties_beside_task(data: Sequence[Batch]) -> dict[str, Any]:
    """The gradient of the penalties on s, as part of the loss, over that of the task, after three steps."""
    model, config = model_and_config(**PENALTIES)
    convert(model, config, progress=False)
    layers = list(masm_layers(model).values())
    optimizer = MaskedAdamW(scale_free_groups(model))
    for batch in data[:3]:
        loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    loss(model, data[3]).backward()
    of_task = [layer.s.grad.norm() for layer in layers]
    of_penalties = torch.autograd.grad(regularization_loss(model, config), [layer.s for layer in layers])
    return spread([float(a.norm() / b) for a, b in zip(of_penalties, of_task)])


def main() -> int:
    """Measure, print and write everything."""
    data = batches(STEPS)
    results = {
        "pretrained weights": beside_lora(data[0]),
        "without lift": first_steps(0.0, data),
        "lift 0.02": first_steps(0.02, data),
        "lift 1": first_steps(1.0, data),
        "penalties in the loss: their gradient on s over the task's": penalties_beside_task(data),
    }
    for name, values in results.items():
        print(f"{name}: {values}")
    out = Path(__file__).resolve().parent / "results" / "first_steps.json"
    write_json(out, {"results": results, "penalties": PENALTIES, "provenance": made_by()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
