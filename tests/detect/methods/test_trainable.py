"""The tensors that training changes, and the hash of all others."""

from __future__ import annotations

import pytest
import torch
from masm_detect.errors import CheckpointError
from masm_detect.methods.trainable import frozen_sha256, load_trainable_state, trainable_state


def test_trainable_state_is_strict():
    model = torch.nn.Linear(2, 3)
    saved = trainable_state(model)
    with pytest.raises(CheckpointError, match=r"1 missing.*bias"):
        load_trainable_state(model, {"weight": saved["weight"]})
    with pytest.raises(CheckpointError, match="1 unexpected"):
        load_trainable_state(model, saved | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"saved \[2\], but the model has \[3\]"):
        load_trainable_state(model, saved | {"bias": torch.zeros(2)})


def test_frozen_hash_sees_frozen_weights_only():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 1))
    model[0].requires_grad_(False)
    start = frozen_sha256(model)
    with torch.no_grad():
        model[1].weight.add_(1)
    assert frozen_sha256(model) == start
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    assert frozen_sha256(model) != start
