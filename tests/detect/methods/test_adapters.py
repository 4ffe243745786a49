"""An adapter fits the backbone that it was trained on, and no other."""

from __future__ import annotations

import pytest
from masm_detect.config import OptimConfig
from masm_detect.errors import UserError
from masm_detect.evaluation.runs import load_run
from masm_detect.methods.registry import METHODS
from masm_detect.training.run import train
from tiny import run_config

from masm_ext.adapter import AdapterError


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_fits_its_own_backbone_only(tiny_data, tiny_backbone, tmp_path, tiny_detector, method):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "run", method, optim=OptimConfig(epochs=1, batch_size=12)))
    load_run(tmp_path / "run")
    other = tiny_detector(seed=1).backbone.model
    other.save_pretrained(tiny_backbone)
    with pytest.raises((UserError, AdapterError), match=r"another backbone|base model does not fit"):
        load_run(tmp_path / "run")
    # Only a layer that no method but "full" trains is another one.
    same = tiny_detector().backbone.model
    same.layernorm.weight.data.mul_(1.001)
    same.save_pretrained(tiny_backbone)
    with pytest.raises((UserError, AdapterError), match=r"another backbone|1 of its tensors.*layernorm\.weight"):
        load_run(tmp_path / "run")
