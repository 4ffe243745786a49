"""Which modules a pattern names; what the report of a conversion lists; the static policy cannot be skipped."""

import pytest
import torch
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, select_layers
from masm_ext.convert import with_targets
from masm_ext.selection import SelectedLayers, named_by, saved_modules


class Tower(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.head = nn.Linear(6, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.q(x)))


class Detector(nn.Module):
    """A head of its own on a tower that has a head too, as SigLIP's."""

    def __init__(self):
        super().__init__()
        self.vision_model = Tower()
        self.head = nn.Linear(6, 1)

    def forward(self, x):
        return self.head(self.vision_model(x))


def converted_names(**fields):
    model = Detector()
    report = convert(model, MASMConfig(num_subspaces=1, subspace_rank=1, **fields), use_cache=False, progress=False)
    return [layer.name for layer in report.layers], [name for name, _ in report.other_trainable]


def test_an_exact_name_means_that_module_alone():
    layers, others = converted_names(target_modules="q", modules_to_save="head")
    assert layers == ["vision_model.q"] and others == ["head.weight", "head.bias"]
    assert converted_names(target_modules="head")[0] == ["head"]
    assert converted_names(target_modules="*", exclude_modules="head")[0] == ["vision_model.q", "vision_model.head"]
    both = converted_names(target_modules="q", modules_to_save="re:(.*\\.)?head")[1]
    assert both == ["vision_model.head.weight", "vision_model.head.bias", "head.weight", "head.bias"]


def test_forms_of_patterns():
    modules = dict(Detector().named_modules())
    for pattern, names in (
        ("head", {"head"}),
        ("vision_model.head", {"vision_model.head"}),
        ("q", {"vision_model.q"}),
        ("vision_model", {"vision_model"}),
        ("*head", {"head", "vision_model.head"}),
        (("q", "head"), {"vision_model.q", "head"}),
        (lambda name, module: isinstance(module, Tower), {"vision_model"}),
        ("ead", set()),
    ):
        assert named_by(modules, pattern) == names
    assert named_by(modules, "head", exact_first=False) == {"head", "vision_model.head"}
    assert saved_modules(modules, ("head", "q")) == ["vision_model.q", "head"]


def test_an_exact_name_of_a_module_that_is_no_linear_is_explained():
    model = nn.ModuleDict({"q": nn.ModuleDict({"q": nn.Linear(4, 4)})})
    with pytest.raises(ValueError, match=r"match no nn.Linear.*q\.q \('q' is a ModuleDict; an exact name names that"):
        convert(model, MASMConfig(target_modules="q", subspace_rank=1), use_cache=False, progress=False)


def test_the_report_lists_everything_that_learns_outside_the_layers():
    model = Detector()
    model.head.register_parameter("temperature", nn.Parameter(torch.tensor(1.0)))
    config = MASMConfig(target_modules="q", modules_to_save="head", num_subspaces=1, subspace_rank=1, train_bias=True)
    report = convert(model, config, use_cache=False, progress=False)
    assert report.other_trainable == (("head.weight", (1, 6)), ("head.bias", (1,)), ("head.temperature", ()))
    text = str(report)
    assert "trainable outside the converted layers:" in text and "head.weight  1 x 6" in text
    assert "head.temperature  scalar" in text and "q.bias" not in text
    none = convert(Detector(), MASMConfig(target_modules="q", subspace_rank=1), use_cache=False, progress=False)
    assert none.other_trainable == () and "outside" not in str(none)


STATIC = MASMConfig(target_modules="*", num_subspaces=1, subspace_rank=1, mask_policy="static")


def selected(model):
    batches = [torch.randn(5, 6) for _ in range(3)]
    return select_layers(model, STATIC, batches, lambda m, x: m(x).square().mean())


def test_the_static_policy_decomposes_what_was_selected():
    model = Detector()
    names = selected(model)
    assert isinstance(names, SelectedLayers) and 0 < len(names) < 3
    report = convert(model, STATIC, target_modules=names, use_cache=False, progress=False)
    assert [layer.name for layer in report.layers] == names
    assert model.masm_config == with_targets(STATIC, names)


@pytest.mark.parametrize(
    ("arguments", "arrived"),
    [
        (lambda names: {}, "nothing"),
        (lambda names: {"target_modules": "q"}, "a str"),
        (lambda names: {"target_modules": list(names)}, "a list"),
        (lambda names: {"target_modules": names[:]}, "a list"),
        (lambda names: {"target_modules": lambda *_: True}, "a function"),
    ],
)
def test_the_static_policy_without_a_selection_is_an_error(arguments, arrived):
    model = Detector()
    names = selected(model)
    with pytest.raises(ValueError, match=f"pass target_modules=select_layers.* got {arrived}"):
        convert(model, STATIC, **arguments(names), use_cache=False, progress=False)
    with pytest.raises(ValueError, match="got nothing"):
        convert(model, with_targets(STATIC, names), use_cache=False, progress=False)
    assert not any(isinstance(m, MASMLinear) for m in model.modules())


def test_a_selection_of_another_model_and_a_kept_one():
    model = Detector()
    with pytest.raises(ValueError, match=r"chosen on another model: this one has no trunk\.q"):
        convert(model, STATIC, target_modules=SelectedLayers(["trunk.q"]), use_cache=False, progress=False)
    kept = SelectedLayers(["vision_model.q"])
    assert len(convert(model, STATIC, target_modules=kept, use_cache=False, progress=False).layers) == 1


def test_a_selection_names_its_layers_exactly():
    """Not as patterns: 'head' of the selection is not the tower's."""
    names = SelectedLayers(["head"])
    report = convert(Detector(), STATIC, target_modules=names, use_cache=False, progress=False)
    assert [layer.name for layer in report.layers] == ["head"]
