"""One of two processes of test_scaling.py: FOLDER RANK SEED. DistributedDataParallel with MaskedAdamW."""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups

STEPS = 16
#: Step whose loss is infinite in the last process.
OVERFLOW = 7
CONFIG = MASMConfig(
    target_modules=["0", "2"], modules_to_save="4", num_subspaces=2, subspace_rank=2, mask_warmup=3, mask_interval=3
)


def build(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    convert(model, CONFIG, use_cache=False, progress=False)
    masks = LayerMasks(model, CONFIG)
    return model, MaskedAdamW(param_groups(model, 1e-3, weight_decay=0.1), masks=masks, orthogonality=1e-2)


def loss_of(model, seed, step, rows):
    x = torch.randn(16, 12, generator=torch.Generator().manual_seed(100 * seed + step))[rows]
    return (model(x) - x[:, :1].sin()).square().mean()


def outcome(model, optimizer):
    masks = {k: v for k, v in optimizer.masks.state_dict().items() if isinstance(v, torch.Tensor)}
    moments = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    learned = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    return learned | masks | moments | {"skipped": torch.tensor(optimizer.skipped_steps)}


def accumulate(seed, rank):
    """Each half of a batch in two backward passes; only the second one communicates."""
    inner, optimizer = build(seed)
    model = DistributedDataParallel(inner)
    for step in range(STEPS):
        for part in range(2):
            start = 8 * rank + 4 * part
            with model.no_sync() if part == 0 else nullcontext():
                (loss_of(model, seed, step, slice(start, start + 4)) / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    return outcome(inner, optimizer)


def overflow(seed, rank):
    """A loss that is infinite in one process: both skip the step, and halve the scale."""
    inner, optimizer = build(seed)
    model = DistributedDataParallel(inner)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(STEPS):
        loss = loss_of(model, seed, step, slice(8 * rank, 8 * rank + 8))
        if step == OVERFLOW and rank == 1:
            loss = loss * torch.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return outcome(inner, optimizer) | {"scale": torch.tensor(scaler.get_scale())}


def main(folder, rank, seed):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for run in (accumulate, overflow):
        torch.save(run(seed, rank), folder / f"{run.__name__}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
