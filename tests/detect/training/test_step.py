"""One step: it never waits for the device; the class weights of its loss."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from masm_detect.config import OptimConfig
from masm_detect.methods.method import Method
from masm_detect.training.step import class_weights, train_step
from no_waiting import NoWaiting, Waits
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from masm_ext import MaskedAdamW, MASMLinear
from masm_ext.decomposition import Decomposition


def test_a_step_does_not_wait_for_the_device():
    """Fake tensors, on the CPU: autograd knows "cuda" only where there is one, and copies to the host are seen there
    only (tests/gpu). The optimizer under masks: tests/optim/test_no_waiting.py.
    """

    class Tiny(nn.Module):
        reads_a_value = False

        def __init__(self):
            super().__init__()
            u, s, v = torch.ones(3, 12), torch.ones(3), torch.ones(3, 12)
            self.layer = MASMLinear(Decomposition(torch.ones(12, 12), u, s, v, (0, 1, 2, 3), 0.0))
            self.head = nn.Linear(12, 1)

        def forward(self, images):
            logits = self.head(self.layer(images.flatten(1))).squeeze(-1)
            return logits * logits.max().item() if self.reads_a_value else logits

    with FakeTensorMode():
        detector = Tiny()
        optimizer = MaskedAdamW(detector.parameters(), orthogonality=1e-2, spectral_consistency=1e-3)
        method = Method("masm-nomask", optimizer, lambda: sum(optimizer.penalties), None, 0)
        images, labels = torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
        options = {"weights": torch.ones(2), "optim": OptimConfig(), "autocast_context": nullcontext()}
        with NoWaiting(warming_up=True):
            train_step(detector, method, images, labels, **options)
        with NoWaiting():
            for _ in range(2):
                losses = train_step(detector, method, images, labels, **options)
            assert [loss.shape for loss in losses] == [(), ()] and not any(loss.requires_grad for loss in losses)
            detector.reads_a_value = True
            with pytest.raises(Waits):
                train_step(detector, method, images, labels, **options)


def test_class_balance():
    weights_ = class_weights([0, 0, 0, 1], balance=True)
    torch.testing.assert_close(weights_, torch.tensor([4 / 6, 2.0]))
    assert class_weights([0, 1], balance=False).tolist() == [1, 1]
