"""A small model, its optimizer and a few steps, for tests of their state."""

import io

import torch
from torch import nn

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups

CONFIG = MASMConfig(
    target_modules=["0", "2"],
    modules_to_save="4",
    num_subspaces=2,
    subspace_rank=2,
    mask_warmup=1,
    mask_interval=2,
    mask_probe_interval=3,
    mask_probe_steps=1,
)


def base(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))


def build(named=True):
    """A model and its optimizer; not `named`: LayerMasks only inside the optimizer."""
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    masks = LayerMasks(model, CONFIG) if named else None
    optimizer = MaskedAdamW(param_groups(model, 1e-2, weight_decay=0.1), masks=masks, orthogonality=1e-2)
    return model, optimizer


def train(model, optimizer, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator)
        (model(x) - x[:, :1].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def through_a_file(state):
    """As frameworks keep it: written by torch.save, read as weights only."""
    data = io.BytesIO()
    torch.save(state, data)
    data.seek(0)
    return torch.load(data, weights_only=True)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values()))
