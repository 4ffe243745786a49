"""One owner of the adaptation state: model and optimizer state_dict are enough, and half of them is refused."""

import copy
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, load_adapter, param_groups, save_adapter

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


@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("named", [True, False])
def test_two_state_dicts_continue_a_run_bit_for_bit(first, named):
    model, optimizer = build(named)
    train(model, optimizer, 11, 1)
    states = through_a_file(model.state_dict()), through_a_file(optimizer.state_dict())
    train(model, optimizer, 11, 2)
    again, its_optimizer = build(named)
    loads = [lambda: again.load_state_dict(states[0]), lambda: its_optimizer.load_state_dict(states[1])]
    for load in loads if first == "model" else loads[::-1]:
        load()
    train(again, its_optimizer, 11, 2)
    assert same(model, again)
    assert torch.equal(optimizer.masks.masks, its_optimizer.masks.masks)
    assert torch.equal(optimizer.masks.snr, its_optimizer.masks.snr)
    assert optimizer.masks.history == its_optimizer.masks.history


@pytest.mark.parametrize("half", ["model", "optimizer"])
def test_half_a_restore_is_refused(half):
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    again, its_optimizer = build()
    if half == "model":
        again.load_state_dict(model.state_dict())
        message = r"layers are at step \[5\], the optimizer and its masks at 0"
    else:
        its_optimizer.load_state_dict(optimizer.state_dict())
        message = r"layers are at step \[0\], the optimizer and its masks at 5"
    before = copy.deepcopy(again.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            train(again, its_optimizer, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), again.state_dict().values()))
    its_optimizer.masks.accept_layers()  # on purpose
    train(again, its_optimizer, 1, 1)


def test_states_of_two_steps_are_refused():
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    state = copy.deepcopy(model.state_dict())
    train(model, optimizer, 1, 1)
    again, its_optimizer = build()
    again.load_state_dict(state)
    its_optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"at step \[5\], the optimizer and its masks at 6"):
        train(again, its_optimizer, 1, 1)


def test_a_round_trip_of_the_optimizer_alone_is_no_restore():
    """As accelerate's prepare makes one."""
    model, optimizer = build()
    train(model, optimizer, 3, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 1)


def test_an_adapter_starts_a_run_of_its_own(tmp_path):
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    masks = [layer.mask.tolist() for layer in optimizer.masks.layers.values()]
    assert masks != [[True, True]] * 2
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    own = LayerMasks(fresh, CONFIG)
    assert [layer.mask.tolist() for layer in own.layers.values()] == masks == (own.masks != 0).tolist()
    train(fresh, MaskedAdamW(param_groups(fresh, 1e-3), masks=own), 2, 1)


def test_a_masked_block_stays_whoever_built_the_optimizer():
    """Without LayerMasks, too, and past the steps after which one would be probed."""
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    model[0].mask[1] = False
    held = model[0].u[2:].clone(), model[0].s[2:].clone(), model[0].v[2:].clone()
    for params in (param_groups(model, 1e-2, weight_decay=0.1), [p for p in model.parameters() if p.requires_grad]):
        train(model, MaskedAdamW(params, weight_decay=0.1), 120, 1)
        assert all(torch.equal(a, b) for a, b in zip(held, (model[0].u[2:], model[0].s[2:], model[0].v[2:])))
    assert model[0].mask.tolist() == [True, False]


def test_a_mask_that_is_changed_by_hand_counts_as_selected():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    optimizer = MaskedAdamW(param_groups(model, 1e-2))
    train(model, optimizer, 2, 1)
    model[2].mask[0] = False
    held = model[2].u[:2].clone()
    train(model, optimizer, 3, 1)
    assert torch.equal(held, model[2].u[:2]) and optimizer.masks.masks.tolist() == [[1, 1], [0, 1]]
    model[2].mask.fill_(True)
    train(model, optimizer, 2, 1)
    assert not torch.equal(held, model[2].u[:2])


def test_masks_must_cover_the_layers_of_the_parameters():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    with pytest.raises(ValueError, match="1 layers that own parameters are not in masks="):
        MaskedAdamW(param_groups(model, 1e-2), masks=LayerMasks([model[0]], CONFIG))


def test_state_of_another_kind_is_refused():
    _, optimizer = build()
    state = optimizer.state_dict()
    masks = state["masked"]["masks"]
    for change, message in (
        ({"masks": None}, "the state holds no masks, this optimizer has some"),
        ({"masks": {**masks, "power": torch.zeros(1)}}, r"power must have shape \[2, 2\], got \[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict({**state, "masked": {**state["masked"], **change}})
    missing = {k: v for k, v in state["masked"]["masks"].items() if k != "signal"}
    with pytest.raises(ValueError, match=r"the state lacks \['signal'\]"):
        optimizer.load_state_dict({**state, "masked": {**state["masked"], "masks": missing}})


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


def test_a_converted_state_is_not_that_of_the_pretrained_model():
    model, _ = build()
    result = base(1).load_state_dict(model.state_dict(), strict=False)
    assert {"0.weight", "2.weight"} <= set(result.missing_keys)
    assert model[0].weight.dtype == torch.float32 and model[0].weight is model[0].principal


def test_a_foreign_extra_state_is_refused():
    model, _ = build()
    for bad in (torch.zeros(3, dtype=torch.uint8), torch.full((80,), 300.0)):
        with pytest.raises(ValueError, match="extra state of 80 elements"):
            model[0].set_extra_state(bad)


def test_two_processes_hold_the_same_masks_and_weights(tmp_path):
    """DistributedDataParallel over gloo: statistics come from reduced gradients, so that every rank chooses alike, and
    as one process does on both halves of the batch."""
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


def test_a_group_that_is_added_must_be_covered_too():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    optimizer = MaskedAdamW(model[4].parameters())
    with pytest.raises(ValueError, match="1 layers that own parameters are not in masks="):
        optimizer.add_param_group({"params": [model[0].u]})


def test_a_state_that_does_not_fit_changes_nothing():
    model, optimizer = build()
    train(model, optimizer, 3, 1)
    before, masks = copy.deepcopy(optimizer.state_dict()), optimizer.masks.masks.clone()
    other = copy.deepcopy(before)
    other["param_groups"] = other["param_groups"][:1]
    other["masked"]["masks"]["selected"].zero_()
    with pytest.raises(ValueError, match="parameter groups"):
        optimizer.load_state_dict(other)
    assert torch.equal(optimizer.masks.masks, masks)
    train(model, optimizer, 1, 1)


@pytest.mark.parametrize("half", ["model", "optimizer"])
def test_half_a_restore_stays_one_when_it_is_saved_again(half):
    model, optimizer = build()
    train(model, optimizer, 5, 1)
    again, its_optimizer = build()
    if half == "model":
        again.load_state_dict(model.state_dict())
    else:
        its_optimizer.load_state_dict(optimizer.state_dict())
    states = through_a_file(again.state_dict()), through_a_file(its_optimizer.state_dict())
    third, last = build()
    third.load_state_dict(states[0])
    last.load_state_dict(states[1])
    with pytest.raises(RuntimeError, match="only one of the two was restored"):
        train(third, last, 1, 1)


def test_layers_have_one_optimizer():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    first = MaskedAdamW([p for layer in (model[0], model[2]) for p in (layer.u, layer.v)])
    second = MaskedAdamW([model[0].s, model[2].s])
    model(torch.randn(4, 12)).sum().backward()
    second.step()
    with pytest.raises(RuntimeError, match=r"another optimizer was made over these layers.*parameter groups"):
        first.step()
    masks = LayerMasks(model, CONFIG)
    shared = [MaskedAdamW([p], masks=masks) for p in (model[0].u, model[0].s)]
    shared[1].step()
    with pytest.raises(RuntimeError, match="one table counts the steps of one optimizer"):
        shared[0].step()


def test_an_adapter_holds_what_the_policy_chose_not_a_probe(tmp_path):
    model, optimizer = build()
    for step in range(40):
        train(model, optimizer, 1, step)
        selected, in_force = (t != 0 for t in optimizer.masks._state[2])
        if not torch.equal(selected, in_force):
            break
    else:
        pytest.fail("no probe")
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert torch.equal(torch.stack([fresh[0].mask, fresh[2].mask]), selected)


def test_a_refused_group_leaves_the_optimizer_as_it_was():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    optimizer = MaskedAdamW(model[4].parameters())
    with pytest.raises(ValueError, match="not in masks="):
        optimizer.add_param_group({"params": (p for p in [model[0].u])})
    assert len(optimizer.param_groups) == 1
    model(torch.randn(4, 12)).sum().backward()
    optimizer.step()


def test_penalties_are_those_of_layers_that_the_optimizer_trains():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    with torch.no_grad():
        model[2].u.fill_(float("inf"))
    optimizer = MaskedAdamW([model[0].u], orthogonality=1e-2)
    model[0].u.grad = torch.ones_like(model[0].u)
    before = model[0].u.detach().clone()
    optimizer.step()
    assert optimizer.skipped_steps == 0 and not torch.equal(before, model[0].u)


def test_a_shallow_copy_that_shares_parameters_is_told_apart():
    model = base()
    convert(model, CONFIG, use_cache=False, progress=False)
    twin = copy.copy(model[0])
    with pytest.raises(ValueError, match="belongs to 2 layers, of which one is a shallow copy"):
        MaskedAdamW(param_groups(model, 1e-3))
    assert MaskedAdamW(param_groups(model, 1e-3), masks=LayerMasks(model, CONFIG)).masks.layer_names == ("0", "2")
    del twin


def test_groups_of_an_older_state_get_the_settings_they_lack():
    p = nn.Parameter(torch.ones(3))
    optimizer = MaskedAdamW([p])
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        del group["orthogonality"], group["spectral_consistency"]
    optimizer.load_state_dict(state)
    p.grad = torch.ones(3)
    optimizer.step()
