"""How far 100 steps move the weights of a small and of a large vision transformer, with the same settings.

    python benchmarks/generalization/rates.py

Transformers of random weights, of the sizes of ViT-S and ViT-L, learn the same small task: to tell noise images with a
faint grid from plain ones, with two subspaces and the lift and rates that `masm train` has by default. Two further
cases take one difference between the sizes away each: the share of the directions that learn, and the depth. Writes
`results/rates.json`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from masm_detect.results import write_json
from runner import made_by
from transformers import Dinov2Config, Dinov2Model

from masm_ext import MaskedAdamW, MASMConfig, convert, scale_free_groups
from masm_ext.nn.masm_linear import MASMLinear, masm_layers
from masm_ext.progress import Progress

SMALL = dict(hidden_size=384, num_hidden_layers=12, num_attention_heads=6)
LARGE = dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16)
#: Name -> size of the transformer and ranks of the two subspaces. 21 of 1024 directions are as many as 8 of 384.
CASES: dict[str, tuple[dict[str, int], list[int]]] = {
    "ViT-S": (SMALL, [4, 4]),
    "ViT-L": (LARGE, [4, 4]),
    "ViT-L, as large a share of directions": (LARGE, [11, 10]),
    "ViT-L of 12 layers, as large a share of directions": (LARGE | {"num_hidden_layers": 12}, [11, 10]),
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


def moved(case: str) -> dict[str, dict[str, float]]:
    """How far the converted layers are from the pretrained ones after STEPS steps: ||dW|| / ||W|| in Frobenius norms,
    and the spectral norm of dW over the root mean square of W's singular values, which is what an input feels at most.
    """
    size, ranks = CASES[case]
    model = Classifier(size)
    config = MASMConfig(
        target_modules=["re:.*attention\\.(q|k|v|o)_proj"],
        modules_to_save="head",
        num_subspaces=2,
        subspace_rank=ranks,
        mask_policy="none",
        lift=0.02,
    )
    convert(model, config, progress=False)
    layers = list(masm_layers(model).values())
    start = [artifact_part(layer) for layer in layers]
    optimizer = MaskedAdamW(scale_free_groups(model))
    generator = torch.Generator().manual_seed(1)
    for _ in Progress(range(STEPS), desc=case, unit="step"):
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
    """Run all cases; prints and writes the figures."""
    results = {case: moved(case) for case in CASES}
    for norm in ("frobenius", "spectral"):
        print(f"{norm} after {STEPS} steps:")
        for case, values in results.items():
            print("  {}: {mean:.4f} ({least:.4f} to {largest:.4f})".format(case, **values[norm]))
    settings = {"steps": STEPS, "batch": BATCH, "side": SIDE, "cases": CASES}
    out = Path(__file__).resolve().parent / "results" / "rates.json"
    write_json(out, {"settings": settings, "results": results, "provenance": made_by()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
