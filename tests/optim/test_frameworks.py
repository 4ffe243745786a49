"""The state under averaging, DDP, the trainer of transformers, and accelerate."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from optimizer_runs import base, build, same, train
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from masm_ext import load_adapter, save_adapter


def test_an_average_is_still_a_model_of_its_base(tmp_path):
    model, optimizer = build()
    hash_before = model[0].base_hash
    torch_average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    by_hand = {k: v.clone() for k, v in model.state_dict().items()}
    in_place = copy.deepcopy(model)
    for seed in range(6):
        train(model, optimizer, 1, seed)
        torch_average.update_parameters(model)
        by_hand = {k: 0.9 * by_hand[k] + 0.1 * v for k, v in model.state_dict().items()}
        with torch.no_grad():  # timm's ModelEmaV2
            for a, b in zip(in_place.state_dict().values(), model.state_dict().values()):
                a.copy_(0.9 * a + 0.1 * b)
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(by_hand)
    half = copy.deepcopy(model).half().float()
    for name, average in (("torch", torch_average), ("by hand", loaded), ("in place", in_place), ("half", half)):
        inner = average.module if isinstance(average, AveragedModel) else average
        assert inner[0].base_hash == hash_before, name
        if name == "torch":  # the others round frozen tensors, and an adapter does not carry those
            save_adapter(average, tmp_path)
            load_adapter(base(), tmp_path)


def test_two_processes_hold_the_same_masks_and_weights(tmp_path):
    """DistributedDataParallel over gloo: statistics come from reduced gradients, so every rank makes the same choice,
    and so does one process on both halves of the batch."""
    script = Path(__file__).parent / "ddp_worker.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(script), str(tmp_path)]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE, text=True) for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors[-3000:]
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (a["masks"] == 0).any()
    single = torch.load(tmp_path / "single.pt", weights_only=True)
    assert torch.equal(a["masks"], single["masks"])
    assert all((a[k] - single[k]).abs().max() <= 1e-4 for k in a if a[k].is_floating_point())


def test_the_trainer_of_transformers_resumes_bit_for_bit(tmp_path):
    transformers = pytest.importorskip("transformers")

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 64

        def __getitem__(self, i):
            x = torch.randn(12, generator=torch.Generator().manual_seed(i))
            return {"x": x, "labels": x[:1].sin()}

    class Model(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, x, labels):
            return {"loss": (self.body(x) - labels).square().mean()}

    def trainer(folder):
        body, optimizer = build()
        arguments = transformers.TrainingArguments(
            output_dir=str(folder), max_steps=8, per_device_train_batch_size=8, save_steps=4, save_strategy="steps",
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_num_workers=0,
        )  # fmt: skip
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return transformers.Trainer(Model(body), arguments, train_dataset=Data(), optimizers=(optimizer, schedule))

    whole = trainer(tmp_path / "whole")
    whole.train()
    resumed = trainer(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert same(whole.model, resumed.model)
    assert all(layer.mask.shape == (2,) for layer in resumed.model.body if hasattr(layer, "mask"))


def test_accelerate_saves_and_loads_the_state(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*build())
    train(model, optimizer, 5, 1)
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, 5, 2)
    again, its_optimizer = accelerator.prepare(*build())
    accelerator._models, accelerator._optimizers = [again], [its_optimizer]
    accelerator.load_state(str(tmp_path))
    train(again, its_optimizer, 5, 2)
    assert same(model, again)
