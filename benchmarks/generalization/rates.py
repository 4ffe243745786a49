"""How far 100 steps move the weights of a small and of a large vision transformer, with the same settings.

    python benchmarks/generalization/rates.py

Two transformers of random weights, of the sizes of ViT-S and ViT-L, learn the same small task: to tell noise images
with a faint grid from plain ones, with two subspaces of rank 4 and the lift and rates that `masm train` has by default.
Writes `results/rates.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from masm_detect.provenance import git_state, provenance
from masm_detect.results import write_json
from transformers import Dinov2Config, Dinov2Model

from masm_ext import MaskedAdamW, MASMConfig, convert, scale_free_groups
from masm_ext.nn.masm_linear import MASMLinear, masm_layers
from masm_ext.progress import Progress

SIZES = {
    "ViT-S": dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6),
    "ViT-L": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}
STEPS, BATCH, SIDE = 100, 4, 56


class Classifier(torch.nn.Module):
    """A backbone of random weights and a linear head on its class token."""

    def __init__(self, size: dict) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = Dinov2Model(Dinov2Config(**size, image_size=SIDE, patch_size=14))
        self.head = torch.nn.Linear(size["hidden_size"], 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """images [B, 3, SIDE, SIDE] -> logits [B]."""
        return self.head(self.backbone(images).last_hidden_state[:, 0]).squeeze(-1)


def moved(size: str) -> dict[str, dict[str, float]]:
    """How far the converted layers are from the pretrained ones after STEPS steps: ||dW|| / ||W|| in Frobenius norms,
    and the spectral norm of dW over the root mean square of W's singular values, which is what an input feels at most.
    """
    model = Classifier(SIZES[size])
    config = MASMConfig(
        target_modules=["re:.*attention\\.(q|k|v|o)_proj"],
        modules_to_save="head",
        num_subspaces=2,
        subspace_rank=4,
        mask_policy="none",
        lift=0.02,
    )
    convert(model, config, progress=False)
    layers = list(masm_layers(model).values())
    start = [artifact_part(layer) for layer in layers]
    optimizer = MaskedAdamW(scale_free_groups(model))
    generator = torch.Generator().manual_seed(1)
    for _ in Progress(range(STEPS), desc=size, unit="step"):
        images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
        labels = (torch.arange(BATCH) % 2).float()
        images[labels == 1, :, ::2, ::2] += 0.5
        F.binary_cross_entropy_with_logits(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    spectral = [
        float(torch.linalg.matrix_norm(artifact_part(layer) - before, 2)) / layer.base_norm() * len(before) ** 0.5
        for layer, before in zip(layers, start)
    ]
    measured = {"frobenius": [layer.relative_update() for layer in layers], "spectral": spectral}
    return {
        norm: {"mean": float(np.mean(v)), "least": float(np.min(v)), "largest": float(np.max(v))}
        for norm, v in measured.items()
    }


@torch.no_grad()
def artifact_part(layer: MASMLinear) -> torch.Tensor:
    """sum_i s_i u_i^T v_i of a layer, [N, D]."""
    return (layer.u.T * layer.s) @ layer.v


def main() -> int:
    """Run both sizes; prints and writes the figures."""
    results = {size: moved(size) for size in SIZES}
    for norm in ("frobenius", "spectral"):
        found = {size: values[norm] for size, values in results.items()}
        spans = [f"{size} {v['mean']:.4f} ({v['least']:.4f} to {v['largest']:.4f})" for size, v in found.items()]
        print(f"{norm} after {STEPS} steps: {', '.join(spans)}")
    settings = {"steps": STEPS, "batch": BATCH, "side": SIDE, "sizes": SIZES}
    out = Path(__file__).resolve().parent / "results" / "rates.json"
    made = provenance() | {"git": git_state(out.parents[1], ".", "../../masm_ext")}
    write_json(out, {"settings": settings, "results": results, "provenance": made})
    return 0


if __name__ == "__main__":
    sys.exit(main())
