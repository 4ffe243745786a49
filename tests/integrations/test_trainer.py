"""MASM under the Trainer of transformers: resuming is bit for bit, logs and files hold what the optimizer knows."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers", reason="needs the extra masm_ext[peft]")
pytest.importorskip("accelerate", reason="needs the extra masm_ext[peft]")
pytest.importorskip("peft", reason="needs the extra masm_ext[peft]")
import transformers
from peft import get_peft_model

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, convert, param_groups
from masm_ext.integrations.peft import MASMTunerConfig
from masm_ext.integrations.trainer import HISTORY_NAME, MASMCallback, MASMOptimizerFactory, masm_optimizer
from masm_ext.nn.masm_linear import masm_layers

SETTINGS = {
    "num_subspaces": 2,
    "subspace_rank": 2,
    "mask_warmup": 2,
    "mask_interval": 2,
    "mask_probe_interval": 3,
    "mask_probe_steps": 1,
}
STEPS = 10


class Pictures(torch.utils.data.Dataset):
    """32 pictures of noise, brighter in the second class."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.pixels = torch.randn(32, 3, 16, 16, generator=generator)
        self.pixels[16:] += 0.5

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return {"pixel_values": self.pixels[i], "labels": int(i >= 16)}


class Sentences(torch.utils.data.Dataset):
    """32 sentences of random tokens, the second class with token 5 in front."""

    def __init__(self, seed):
        self.ids = torch.randint(6, 40, (32, 7), generator=torch.Generator().manual_seed(seed))
        self.ids[16:, 0] = 5

    def __len__(self):
        return 32

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "attention_mask": torch.ones(7, dtype=torch.long), "labels": int(i >= 16)}


def vit(seed):
    """A tiny ViT after convert(), and its config. With dropout, so that resuming must restore random numbers."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.ViTForImageClassification(
        transformers.ViTConfig(image_size=16, patch_size=8, num_labels=2, hidden_dropout_prob=0.1, **shape)
    )
    config = MASMConfig(target_modules=["q_proj", "v_proj", "query", "value"], modules_to_save="classifier", **SETTINGS)
    convert(model, config, progress=False)
    return model, config


def bert(seed):
    """A tiny BERT under PEFT, and its config."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(vocab_size=40, num_labels=2, max_position_embeddings=16, **shape)
    )
    tuner = MASMTunerConfig(target_modules=["query", "value"], task_type="SEQ_CLS", **SETTINGS)
    return get_peft_model(model, tuner), tuner.masm_config()


MODELS = {"vit, convert": (vit, Pictures), "bert, PEFT": (bert, Sentences)}


def arguments(folder, **options):
    given = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "save_strategy": "steps",
        "save_steps": 5,
        "logging_steps": 2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }
    return transformers.TrainingArguments(output_dir=str(folder), **given)


def trainer(name, folder, seed, **options):
    build, data = MODELS[name]
    model, config = build(seed)
    optimizer = masm_optimizer(model, config, lr=2e-2)
    made = transformers.Trainer(
        model, arguments(folder, **options), train_dataset=data(seed), optimizers=(optimizer, None)
    )
    return made, MASMCallback.install(made)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(seed, tmp_path, name):
    whole, _ = trainer(name, tmp_path / "whole", seed)
    whole.train()
    resumed, _ = trainer(name, tmp_path / "resumed", seed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert equal(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    states = [
        torch.load(tmp_path / folder / f"checkpoint-{STEPS}" / "optimizer.pt", weights_only=True)
        for folder in ("whole", "resumed")
    ]
    assert equal(states[0], states[1])
    masks = states[0]["masked"]["masks"]
    assert masks["step"] == STEPS and len(masks["history"]) >= 3 and not masks["selected"].bool().all()
    fresh, _ = MODELS[name][0](seed)
    moved = [not torch.equal(a.s, b.s) for a, b in zip(masm_layers(fresh).values(), masm_layers(whole.model).values())]
    assert any(moved)


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b))
    return a == b


def test_the_trainer_takes_the_steps_of_a_plain_loop(seed, tmp_path):
    """Accumulation over two batches: one update of masks per optimizer step, from the summed gradient."""
    made, callback = trainer(
        "vit, convert", tmp_path, seed, max_steps=4, gradient_accumulation_steps=2, lr_scheduler_type="constant",
        max_grad_norm=0.0, save_strategy="no", train_sampling_strategy="sequential",
    )  # fmt: skip
    model, config = vit(seed)
    for module in (*model.modules(), *made.model.modules()):
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    optimizer = masm_optimizer(model, config, lr=2e-2)
    made.train()
    assert callback.optimizer.masks.step == 4
    data = Pictures(seed)
    for step in range(4):
        for half in range(2):
            rows = [(16 * step + 8 * half + i) % 32 for i in range(8)]
            x = torch.stack([data[i]["pixel_values"] for i in rows])
            y = torch.tensor([data[i]["labels"] for i in rows])
            (model.train()(pixel_values=x, labels=y).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(masm_layers(model).values(), masm_layers(made.model).values()):
        assert torch.equal(a.mask, b.mask)
        assert torch.allclose(a.s, b.s, rtol=1e-4, atol=1e-6) and not torch.equal(a.s, a.s0)


@pytest.mark.parametrize("name", list(MODELS))
def test_logs_and_files(seed, tmp_path, name):
    made, callback = trainer(name, tmp_path, seed)
    seen = []

    class Reporter(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    made.add_callback(Reporter())
    made.train()
    state = json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    assert len(entries) == STEPS // 2
    for entry, reported in zip(entries, seen):
        assert 0 < entry["masm/active_share"] <= 1 and entry["masm/skipped_steps"] == 0
        assert entry["masm/orthogonality"] >= 0 and entry["masm/relative_update"] > 0
        assert all(reported[key] == value for key, value in entry.items() if key.startswith("masm/"))
    assert entries[0]["masm/relative_update"] < entries[-1]["masm/relative_update"]
    layers = [layer.relative_update() for layer in masm_layers(made.model).values()]
    assert callback.values()["masm/relative_update"] == pytest.approx(sum(layers) / len(layers), rel=1e-6)
    optimizer = callback.optimizer
    for folder in (tmp_path, tmp_path / f"checkpoint-{STEPS}"):
        record = json.loads((folder / HISTORY_NAME).read_text())
        assert record["layers"] == list(masm_layers(made.model)) and record["step"] == STEPS
        assert record["history"] == optimizer.masks.history and len(record["history"]) >= 3
    assert json.loads((tmp_path / "checkpoint-5" / HISTORY_NAME).read_text())["step"] == 5


def test_domains_are_set_in_compute_loss(seed, tmp_path):
    """Specialists: a step on domain d updates subspace d modulo K only."""
    torch.manual_seed(seed)
    model, config = vit(seed)
    config = dataclasses.replace(config, mask_policy="specialists")

    class Routed(transformers.Trainer):
        def compute_loss(self, *args, **kwargs):
            callback.optimizer.masks.domain = 1
            return super().compute_loss(*args, **kwargs)

    optimizer = masm_optimizer(model, config, lr=2e-2)
    options = {"train_dataset": Pictures(seed), "optimizers": (optimizer, None)}
    made = Routed(model, arguments(tmp_path, max_steps=2, save_strategy="no"), **options)
    callback = MASMCallback.install(made)
    made.train()
    assert callback.optimizer is optimizer and optimizer.masks.step == 2
    for layer in masm_layers(model).values():
        assert torch.equal(layer.s[:2], layer.s0[:2]) and not torch.equal(layer.s[2:], layer.s0[2:])


def test_the_factory_serves_model_init(seed, tmp_path):
    config = vit(seed)[1]
    given = {"config": config, "groups": param_groups, "lr": 1e-3}
    made = transformers.Trainer(
        model_init=lambda: vit(seed)[0], args=arguments(tmp_path, max_steps=2, save_strategy="no"),
        train_dataset=Pictures(seed), optimizer_cls_and_kwargs=(MASMOptimizerFactory, given),
    )  # fmt: skip
    callback = MASMCallback.install(made)
    made.train()
    assert callback.optimizer.masks.step == 2
    assert {group["initial_lr"] for group in callback.optimizer.param_groups} == {1e-3, 1e-2}


def test_weights_that_the_trainer_does_not_restore_are_an_error(seed, tmp_path):
    """Without the callback, a ViT is saved under older names, which the Trainer skips when it resumes."""
    for folder, checkpoint in (("whole", None), ("resumed", str(tmp_path / "whole" / "checkpoint-5"))):
        model, config = vit(seed)
        made = transformers.Trainer(
            model, arguments(tmp_path / folder, max_steps=5 + 5 * (checkpoint is not None)),
            train_dataset=Pictures(seed), optimizers=(masm_optimizer(model, config), None),
        )  # fmt: skip
        if checkpoint is None:
            made.train()
        else:
            with pytest.raises(RuntimeError, match="only one of the two was restored"):
                made.train(resume_from_checkpoint=checkpoint)


def test_wrong_use(seed, tmp_path):
    model, config = vit(seed)
    made = transformers.Trainer(model, arguments(tmp_path), train_dataset=Pictures(seed), callbacks=[MASMCallback()])
    with pytest.raises(ValueError, match=r"the optimizer of the Trainer is a AdamW without masks"):
        made.train()
    lifted = MASMConfig(lift=0.5)
    with pytest.raises(ValueError, match=r"config.lift is 0.5, with which the penalties cannot be used"):
        masm_optimizer(model, lifted)
    assert isinstance(masm_optimizer(model, config).masks, LayerMasks)
    assert isinstance(masm_optimizer(model, config), MaskedAdamW)
