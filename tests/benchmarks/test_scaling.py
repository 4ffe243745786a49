"""The scaling model: its counts are those of real models and of torch, and docs/scaling.md holds its output."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture
def scaling():
    return pytest.importorskip("scaling")


def clip(size):
    """A vision transformer of CLIP with patches of 14 px, without memory."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=size.width, intermediate_size=4 * size.width, num_hidden_layers=size.depth,
        num_attention_heads=size.heads, image_size=size.image, patch_size=14, attn_implementation="eager",
    )  # fmt: skip
    with torch.device("meta"):
        return CLIPVisionModel(config)


def test_page_and_script_agree(scaling):
    page = scaling.PAGE.read_text()
    assert scaling.filled(page) == page, "run python benchmarks/gpu_model/scaling.py --write"
    assert scaling.FIGURE.is_file()
    with pytest.raises(ValueError, match="0 places for the table 'sent'"):
        scaling.filled(page.replace("<!-- table: sent -->", ""))


@pytest.mark.parametrize("method", ["masm", "lora"])
def test_trained_numbers_are_those_of_a_detector(scaling, method):
    from masm_detect.config import MethodConfig
    from masm_detect.methods.build import build_method, resolve
    from masm_detect.models.backbone import Backbone
    from masm_detect.models.detector import Detector
    from transformers import Dinov2Config, Dinov2Model

    if method == "lora":
        pytest.importorskip("peft")
    size = scaling.VisionSize(width=32, depth=2, heads=2, image=28)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28)
    built = build_method(method, Detector(Backbone(Dinov2Model(config))), resolve(MethodConfig(name=method)), seed=0)
    assert built.trainable_parameters == scaling.METHODS[method][1](size)


@pytest.mark.parametrize("name", ["vit-s", "vit-l"])
def test_all_parameters_are_those_of_clip(scaling, name):
    numbers = sum(parameter.numel() for parameter in clip(scaling.MODELS[name]).parameters())
    assert scaling.full_numbers(scaling.MODELS[name]) == numbers + scaling.head_numbers(scaling.MODELS[name])


def test_measured_numbers_of_the_benchmark_follow_the_same_count(scaling):
    """benchmarks/speed adapts all linear layers of ViT-S at R = 16."""
    step = json.loads((scaling.RESULTS / "all-cpu.json").read_text())["cases"]["step/float32/vit-s"]
    size = scaling.MODELS["vit-s"]
    numbers = 16 * sum(N + D + 1 for N, D in size.linears) + scaling.head_numbers(size)
    assert step["measures"]["step"]["providers"]["masm"]["trained_parameters"] == numbers


@pytest.mark.parametrize("method, trained", [("masm", False), ("full", True)])
def test_operations_are_those_that_torch_counts(scaling, method, trained):
    size = replace(scaling.MODELS["vit-s"], depth=2)
    model = clip(size).requires_grad_(trained)
    pixels = torch.empty(1, 3, 224, 224, device="meta")
    if not trained:  # the adapters of the first block need dX of all blocks
        norm = next(module for name, module in model.named_modules() if name.endswith("pre_layrnorm"))
        norm.register_forward_hook(lambda _, __, out: out.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        model(pixels).last_hidden_state.sum().backward()
    assert scaling.flops(size, method) == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_a_ring_sends_what_the_model_says(scaling, seed, monkeypatch):
    """A ring that adds real numbers: what one process sends, and in how many hops, gives the time of the model."""
    monkeypatch.setitem(scaling.LINKS, "test", (1e9, 0.0))
    random = np.random.default_rng(seed)
    gpus, chunk = int(random.integers(2, 9)), int(random.integers(1, 5))
    values = random.normal(size=(gpus, gpus, chunk))  # [process, part, numbers]
    total, sent, hops = values.sum(0), 0, 0
    for phase in ("add", "copy"):
        for turn in range(gpus - 1):
            start = 0 if phase == "add" else 1
            parts = [(rank + start - turn) % gpus for rank in range(gpus)]
            messages = [values[rank, part].copy() for rank, part in enumerate(parts)]
            for rank, (part, message) in enumerate(zip(parts, messages)):
                after = values[(rank + 1) % gpus]
                after[part] = after[part] + message if phase == "add" else message
            sent, hops = sent + 8 * chunk, hops + 1
    np.testing.assert_allclose(values, np.broadcast_to(total, values.shape))
    assert scaling.all_reduce(8 * gpus * chunk, gpus, "test") == pytest.approx(sent / (1e9 * scaling.REACHED))
    ring = scaling.host_seconds(gpus) * max(1, gpus // 8)  # gloo's all-reduce is such a ring
    assert ring == pytest.approx(hops * scaling.HOST_HOP)


def test_trees_serve_small_messages_of_many_processes(scaling):
    _, hop = scaling.LINKS["400 Gbit/s"]
    assert scaling.all_reduce(4, 512, "400 Gbit/s") == pytest.approx(18 * hop, rel=1e-3)
    assert scaling.all_reduce(4, 1, "400 Gbit/s") == 0
    assert scaling.host_seconds(512) == pytest.approx(1022 / 64 * scaling.HOST_HOP)


def test_buckets_are_about_those_of_torch(scaling):
    size = replace(scaling.MODELS["vit-l"], depth=6)
    shapes = [shape for N, D in size.linears for shape in ((N, D), (N,))]
    tensors = [torch.empty(1).expand(shape) for shape in shapes]
    found, _ = torch.distributed._compute_bucket_assignment_by_size(tensors, [scaling.FIRST_BUCKET, scaling.BUCKET])
    modelled = scaling.buckets(4 * sum(tensor.numel() for tensor in tensors))
    assert abs(len(found) - len(modelled)) <= 0.25 * len(modelled)
    assert sum(modelled) == 4 * sum(tensor.numel() for tensor in tensors)
    assert scaling.buckets(100) == [100]


def test_a_step_is_bound_by_its_longest_part(scaling):
    fast = scaling.Step(compute=4.0, gradients=1.0, flag=2.0)
    assert (fast.seconds, fast.efficiency) == (5.0, 0.8)
    assert replace(fast, flag=8.0).efficiency == 0.5


def test_figure_has_a_line_for_each_method(scaling):
    axes = scaling.figure().axes
    assert len(axes) == 2 and all(len(axis.lines) == len(scaling.METHODS) for axis in axes)
    assert max(max(line.get_ydata(), default=0) for line in axes[0].lines) <= 1
