"""MaskedAdamW with LayerMasks on a GPU: as on a CPU, without waiting, and in a CUDA graph."""

import copy

import pytest
import torch
from mask_states import POLICIES, assert_same, fresh, policy_of, step
from torch import nn

from masm_ext import LayerMasks, MaskedAdamW, MASMConfig, MASMLinear, reference
from masm_ext.decomposition import Decomposition
from masm_ext.ops import update_masks_

pytestmark = pytest.mark.gpu

CONFIG = MASMConfig(
    num_subspaces=3, subspace_rank=2, mask_warmup=2, mask_interval=3, mask_probe_interval=4, mask_probe_steps=2
)
#: Columns of v: on a GPU several pieces a block. Interpreted, a segment takes 10 ms a step however wide.
WIDTH, LAYERS, STEPS = 3000, *((8, 30) if torch.cuda.is_available() else (3, 15))
#: Coefficients of the penalties; without any the op has none to read.
PENALTIES = pytest.mark.parametrize("penalties", [{}, {"orthogonality": 1e-3, "spectral_consistency": 1e-4}], ids=str)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(5, 2), (300, 3)], ids=str)
def test_update_masks(name, shape, device):
    (L, K), steps = shape, 60
    if device.type == "cpu":  # interpreted, a ranking takes 0.1 ms for each pair of layers
        L, steps = min(L, 20), 15
    generator = torch.Generator().manual_seed(0)
    got, want, policy = fresh(L, K, device=device), fresh(L, K), policy_of(name, L)
    for _ in range(steps):
        arguments = step(L, K, generator)
        update_masks_(*got, *(t.to(device) for t in arguments), 0.9, *policy)
        reference.update_masks_(*want, *arguments, 0.9, *policy)
    assert_same([t.cpu() for t in got], want, rtol=1e-12)


def test_update_masks_of_thousands_of_layers(device):
    L, K = 20 if device.type == "cpu" else 4000, 2  # the interpreter's suite has more than one tile of blocks
    generator = torch.Generator().manual_seed(0)
    got, want, policy = fresh(L, K, device=device), fresh(L, K), (1, 2, 0.1, L // 2, 0.0, 1, 3, 2, True)
    for _ in range(6):
        arguments = step(L, K, generator, coarse=True)  # many ties
        update_masks_(*got, *(t.to(device) for t in arguments), 0.0, *policy)
        reference.update_masks_(*want, *arguments, 0.0, *policy)
    assert_same([t.cpu() for t in got], want, rtol=1e-12)


class Run:
    """An optimizer over a few layers whose gradients are drawn anew for each step, into the same memory."""

    def __init__(self, device, lr=1e-2, **penalties):
        torch.manual_seed(0)
        self.layers = nn.ModuleList()
        for _ in range(LAYERS):
            u, s, v = torch.randn(6, 40), torch.rand(6), torch.randn(6, WIDTH)
            self.layers.append(MASMLinear(Decomposition(torch.randn(40, WIDTH), u, s, v, (0, 2, 4, 6), 0.0)))
        self.layers.to(device)
        self.masks = LayerMasks(self.layers, CONFIG)
        self.optimizer = MaskedAdamW(self.layers.parameters(), lr=lr, masks=self.masks, **penalties)
        self.generator = torch.Generator().manual_seed(1)
        for p in self.layers.parameters():
            p.grad = torch.empty_like(p)

    def draw(self, bad=False):
        for i, p in enumerate(self.layers.parameters()):
            p.grad.copy_(torch.randn(p.shape, generator=self.generator) + i % 4)
            if bad:
                p.grad[::2] = float("nan")  # a row of every block: some are not masked

    def steps(self, count, take=None):
        for i in range(count):
            self.draw(bad=i == 4)
            (take or self.optimizer.step)()

    def assert_equals(self, other, exactly=True):
        for a, b in zip(self.layers.parameters(), other.layers.parameters()):
            a, b = a.detach().cpu(), b.detach().cpu()
            assert torch.equal(a, b) if exactly else torch.allclose(a, b, rtol=1e-4, atol=1e-5)
        assert torch.equal(self.masks.masks.cpu(), other.masks.masks.cpu())
        assert self.masks.step == other.masks.step and len(self.masks.history) > 4
        for a, b in zip(self.masks.history, other.masks.history, strict=True):
            assert a["step"] == b["step"] and a["mask"] == b["mask"]
        assert self.optimizer.skipped_steps == other.optimizer.skipped_steps


def test_as_on_a_cpu(device):
    here, there = Run(device), Run("cpu")
    for run in (here, there):
        run.steps(STEPS)
    here.assert_equals(there, exactly=False)
    assert here.optimizer.skipped_steps == 1 and here.masks.masks.device.type == device.type
    for layer, row in zip(here.layers, here.masks.masks != 0):
        assert torch.equal(layer.mask, row)


def test_the_state_moves_between_devices(device):
    here, there = Run(device), Run("cpu")
    here.steps(10)
    there.masks.load_state_dict(copy.deepcopy(here.masks.state_dict()))
    assert torch.equal(there.masks.masks, here.masks.masks.cpu()) and there.masks.history == here.masks.history


@PENALTIES
def test_a_step_waits_for_nothing(penalties, device, gpu_only):
    run = Run(device, **penalties)
    run.steps(3)
    rates = [g["lr"] for g in run.optimizer.param_groups]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(20):
            for group, rate in zip(run.optimizer.param_groups, rates):
                group["lr"] = rate / (1 + i // 2)
            run.optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert run.masks.step == 23 and run.optimizer.skipped_steps == 0


@PENALTIES
def test_a_captured_step_is_a_step(penalties, device, gpu_only):
    """Masks, probes, skipped steps and a rate on the device: replays equal eager steps to the bit (with penalties but
    for the products of cuBLAS in them)."""
    eager, replayed = (Run(device, torch.full((), 1e-2, device=device), **penalties) for _ in range(2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        replayed.steps(3)
    torch.cuda.current_stream().wait_stream(stream)
    eager.steps(3)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed.optimizer.step()
    for rate in (1e-2, 1e-3):
        for run, take in ((eager, None), (replayed, graph.replay)):
            for group in run.optimizer.param_groups:
                group["lr"].fill_(rate)
            run.steps(15, take)
    assert eager.optimizer.skipped_steps == 2
    replayed.assert_equals(eager, exactly=not penalties)


def test_a_step_is_captured_a_second_time(device, gpu_only):
    """After steps for which nothing new had to be uploaded."""
    eager, replayed = Run(device), Run(device)
    for _ in range(4):
        eager.steps(4)
    for _ in range(2):
        replayed.steps(4)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed.optimizer.step()
        replayed.steps(4, graph.replay)
    replayed.assert_equals(eager)


def test_a_mask_out_of_range_is_told(device):
    run = Run(device)
    run.steps(1)
    run.masks.masks.fill_(1.5)
    before = [p.detach().clone() for p in run.layers.parameters()]
    with pytest.raises(RuntimeError, match=r"refused|\[0, 1\]"):
        run.optimizer.step()
        _ = run.optimizer.skipped_steps
    assert all(torch.equal(a, b) for a, b in zip(before, run.layers.parameters()))
