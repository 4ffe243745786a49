"""A data set and a backbone that a test trains in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch


def write_data(folder: Path, seed: int = 0) -> Path:
    """`real/` and `fake-stripes/` in `folder`, 12 images of 28 px each: noise, and noise with stripes that can be
    learned."""
    random = np.random.default_rng(seed)
    for kind in ("real", "fake-stripes"):
        (folder / kind).mkdir(parents=True)
        for index in range(12):
            image = random.integers(60, 200, (28, 28, 3), dtype=np.uint8)
            if kind != "real":
                image[:, ::4] = 255
            assert cv2.imwrite(str(folder / kind / f"{index:02d}.png"), image)
    return folder


def detector(seed: int = 0):
    """A random two-block DINOv2 detector of width 16, patches of 14 px, 28 px images; same seed, same weights."""
    from masm_detect.models.backbone import Backbone
    from masm_detect.models.detector import Detector
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mlp_ratio=2,
        patch_size=14,
        image_size=28,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Detector(Backbone(Dinov2Model(config)))


def run_config(data: Path, backbone: Path, out: Path, method: str = "masm", **changes):
    """A TrainConfig of three epochs, five steps each, in which masks change and checkpoints fall between steps."""
    from masm_detect.config import (
        AugmentConfig,
        DataConfig,
        MasmOptions,
        MethodConfig,
        ModelConfig,
        OptimConfig,
        RuntimeConfig,
        TrainConfig,
    )

    masm = MasmOptions(
        num_subspaces=2,
        subspace_rank=2,
        mask_policy="bias_variance",
        mask_warmup=2,
        mask_interval=2,
        mask_min_active=1,
        mask_active_fraction=0.3,
        mask_probe_interval=3,
        mask_probe_steps=1,
    )
    return replace(
        TrainConfig(
            data=DataConfig(paths=[str(data)], augment=AugmentConfig(flip=0.5, noise=0.5)),
            model=ModelConfig(backbone=str(backbone), image_size=28, local_files_only=True),
            method=MethodConfig(name=method, rank=None if method.startswith("masm") else 2, masm=masm, lr=1e-2),
            optim=OptimConfig(epochs=3, batch_size=4),
            runtime=RuntimeConfig(device="cpu", seed=5, progress=False, checkpoint_every=2, precision="fp32"),
            out=str(out),
        ),
        **changes,
    )


def trained_run(folder: Path, method: str = "masm", **masm) -> Path:
    """The folder of a run on `write_data` and `detector`, in `folder`; its data are in `folder`/data.

    masm: fields of `MasmOptions` in place of those of `run_config`.
    """
    from masm_detect.training.run import train

    data = write_data(folder / "data")
    detector().backbone.model.save_pretrained(folder / "backbone")
    config = run_config(data, folder / "backbone", folder / "run", method)
    method_config = replace(config.method, masm=replace(config.method.masm, **masm))
    return train(replace(config, method=method_config)).folder


def die_at(step: int, monkeypatch) -> None:
    """The process that runs `train` "dies" when it is about to make update number `step`."""
    from masm_detect.training import loop

    real, calls = loop.train_step, iter(range(10**6))

    def dying(*arguments, **options):
        if next(calls) == step:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", dying)
