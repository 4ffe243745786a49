"""One of two processes of test_frameworks.py: FOLDER RANK. Rank 0 also trains alone, on both halves of each batch."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups

STEPS = 12


def build():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    config = MASMConfig(
        target_modules=["0", "2"], modules_to_save="4", num_subspaces=2, subspace_rank=2, mask_warmup=4, mask_interval=4
    )
    convert(model, config, use_cache=False, progress=False)
    return model, LayerMasks(model, config)


def train(model, inner, masks, rows):
    optimizer = MaskedAdamW(param_groups(inner, 1e-3, weight_decay=0.1), masks=masks, orthogonality=1e-2)
    for step in range(STEPS):
        x = torch.randn(16, 12, generator=torch.Generator().manual_seed(step))[rows]
        (model(x) - x[:, :1].sin()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return {**inner.state_dict(), "masks": masks.masks.clone(), "snr": masks.snr}


def main(folder: Path, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model, masks = build()
    torch.save(
        train(DistributedDataParallel(model), model, masks, slice(8 * rank, 8 * rank + 8)), folder / f"{rank}.pt"
    )
    dist.destroy_process_group()
    if rank == 0:
        model, masks = build()
        torch.save(train(model, model, masks, slice(0, 16)), folder / "single.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
