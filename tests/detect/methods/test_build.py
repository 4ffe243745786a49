"""The methods: what they train, that they start as the pretrained model, and their rates."""

from __future__ import annotations

import copy

import pytest
import torch
from masm_detect.config import ConfigError, MasmOptions, MethodConfig
from masm_detect.methods.build import build_method, resolve
from masm_detect.methods.registry import METHODS
from masm_detect.models.backbone import Backbone
from masm_detect.models.detector import Detector

from masm_ext.nn.masm_linear import masm_layers

MASM = MasmOptions(num_subspaces=2, subspace_rank=2, mask_policy="bias_variance", mask_warmup=1, mask_interval=1)


def settings(name: str, **changes) -> MethodConfig:
    return MethodConfig(name=name, rank=None if name.startswith("masm") else 4, masm=MASM, **changes)


def pixels(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", METHODS)
def test_starts_as_the_pretrained_model(name, tiny_detector):
    detector = tiny_detector().eval()
    plain = copy.deepcopy(detector.backbone)
    build_method(name, detector, settings(name), seed=1)
    torch.testing.assert_close(detector.backbone(pixels()), plain(pixels()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_trains_its_parameters_and_no_others(name, tiny_detector):
    detector = tiny_detector()
    method = build_method(name, detector, settings(name), seed=1)
    before = {key: value.clone() for key, value in detector.state_dict().items()}
    trained = {key for key, parameter in detector.named_parameters() if parameter.requires_grad}
    assert sum(detector.get_parameter(key).numel() for key in trained) == method.trainable_parameters
    for _ in range(2):
        loss = detector(pixels()).square().sum()
        loss.backward()
        method.optimizer.step()
        method.optimizer.zero_grad()
    # masm's own book-keeping of which blocks are trained now, and of the steps that were taken
    changed = {key for key, value in detector.state_dict().items() if not torch.equal(value, before[key])}
    changed = {key for key in changed if not key.endswith((".mask", "._extra_state"))}
    assert {"head.weight", "head.bias"} <= changed
    assert changed <= trained
    assert (len(changed) == 2) == (name == "probe")


def test_same_seed_same_start(tiny_detector):
    first, second, third = (tiny_detector() for _ in range(3))
    for detector, seed in ((first, 3), (second, 3), (third, 4)):
        build_method("lora", detector, settings("lora"), seed=seed)
        torch.rand(5)
    assert all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    assert not torch.equal(first.head.weight, third.head.weight)


def test_building_leaves_the_global_generator_alone(tiny_detector):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    build_method("lora", tiny_detector(), settings("lora"), seed=1)
    assert torch.equal(torch.rand(3), expected)


def test_mlp_targets_adapt_more_layers(tiny_detector):
    attention = build_method("effort", tiny_detector(), settings("effort"), seed=0)
    both = build_method("effort", tiny_detector(), settings("effort", targets="attention+mlp"), seed=0)
    assert both.trainable_parameters > attention.trainable_parameters


def test_rates_of_a_config_reach_the_groups(tiny_detector):
    config = settings("masm", lr=1e-3, u_lr_scale=3, v_lr_scale=1, s_lr=5e-3, head_lr=2e-3)
    detector = tiny_detector()
    method = build_method("masm", detector, config, seed=0)
    rates = {name: [] for name in ("uv", "s", "head")}
    for group in method.optimizer.param_groups:
        rates[group["name"]].append(group["initial_lr"])
    # relative to the length of a direction (width 16), and to the norm of each weight (R = 4)
    assert sorted(rates["uv"]) == pytest.approx([1e-3 / 4, 3e-3 / 4]) and rates["head"] == [2e-3]
    norms = [float(layer.folded_weight().norm()) for layer in masm_layers(detector).values()]
    assert rates["s"] == pytest.approx([5e-3 * norm / 2 for norm in norms], rel=1e-4)
    assert resolve(MethodConfig(name="lora")).rank == 8


@pytest.mark.parametrize("name", ["effort", "osf"])
def test_rank_beyond_the_layer_is_refused(name, tiny_detector):
    with pytest.raises(ValueError, match="q = 16"):
        build_method(name, tiny_detector(), MethodConfig(name=name, rank=16), seed=0)


def test_unknown_method_is_refused(tiny_detector):
    with pytest.raises(ConfigError, match="adalora"):
        build_method("adalora", tiny_detector(), MethodConfig(), seed=0)


@pytest.mark.parametrize("name", ["masm", "masm-nomask", "lora", "probe"])
def test_the_pooling_head_of_siglip_stays_frozen(name, tmp_path):
    """The classifier is called "head", and so is SigLIP's pooling head."""
    transformers = pytest.importorskip("transformers")
    vision = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    config = transformers.SiglipVisionConfig(**vision, image_size=28, patch_size=7)
    detector = Detector(Backbone(transformers.SiglipVisionModel(config)))
    assert any(".head." in key for key, _ in detector.named_parameters())
    build_method(name, detector, settings(name), seed=1)
    trained = [key for key, parameter in detector.named_parameters() if parameter.requires_grad]
    assert {"head.weight", "head.bias"} <= set(trained)
    assert not [key for key in trained if ".head." in key]


def test_settings_of_masks_without_a_policy_are_refused():
    with pytest.raises(
        ConfigError, match=r"mask_warmup=5: nothing reads this, because method\.masm\.mask_policy is none"
    ):
        resolve(MethodConfig(name="masm", masm=MasmOptions(mask_warmup=5)))
    resolve(MethodConfig(name="masm", masm=MasmOptions(mask_policy="random", mask_warmup=5)))
    resolve(MethodConfig(name="masm-nomask", masm=MasmOptions(mask_warmup=5)))
