"""A small network with MASM adapters of PEFT, and its training. Importing it skips a test module without PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

pytest.importorskip("peft", reason="needs the extra masm_ext[peft]")
from peft import PeftModel, get_peft_model

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, param_groups
from masm_ext.integrations.peft import MASMTunerConfig
from masm_ext.nn.masm_linear import masm_layers

SETTINGS = {
    "num_subspaces": 3,
    "subspace_rank": 4,
    "mask_warmup": 4,
    "mask_interval": 4,
    "mask_probe_interval": 6,
    "mask_probe_steps": 1,
}


def base(seed: int, dtype=torch.float32) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 48, bias=False), nn.Tanh(), nn.Linear(48, 2))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5)
    return model.to(dtype)


def tuned(seed: int, dtype=torch.float32, **options) -> PeftModel:
    given = {"target_modules": ["0", "2"], "modules_to_save": ["4"], **SETTINGS, **options}
    return get_peft_model(base(seed, dtype), MASMTunerConfig(**given))


def batch(seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(24, 32, generator=torch.Generator().manual_seed(seed + step))
    return x, (x[:, 0] > 0).long()


def train(model: nn.Module, config: MASMConfig, seed: int, steps: int) -> LayerMasks:
    masks = LayerMasks(model, config)
    optimizer = MaskedAdamW(param_groups(model, 1e-2), masks=masks, orthogonality=1e-2, spectral_consistency=1e-3)
    for step in range(steps):
        x, y = batch(seed, step)
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return masks


def disturb(model: nn.Module) -> None:
    """Move every factor away from its start, as training would."""
    with torch.no_grad():
        for layer in masm_layers(model).values():
            for factor in (layer.u, layer.s, layer.v):
                factor.add_(torch.randn_like(factor), alpha=0.1)
