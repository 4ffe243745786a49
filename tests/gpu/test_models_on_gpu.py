"""Whole models on a GPU: the compiler, autocast, checkpoints, graphs of a step, memory, and training as on a CPU."""

import copy

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import MaskedAdamW, MASMConfig, convert, group_projections, regularization_loss
from masm_ext.kernels import tuning
from masm_ext.kernels.launch import Target, Tile

pytestmark = pytest.mark.gpu


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        z = self.norm(x)
        q, k, v = self.query(z), self.key(z), self.value(z)
        return x + self.out(nn.functional.scaled_dot_product_attention(q, k, v))


CONFIG = MASMConfig(target_modules=("query", "key", "value", "out"), subspace_rank=2)


def converted(device, dtype=torch.float32, grouped=True):
    width = 32 if device.type == "cpu" else 256
    model = nn.Sequential(Block(width), Block(width))
    convert(model, CONFIG, use_cache=False, progress=False)
    model = model.to(device, dtype)
    if grouped:
        assert group_projections(model) == 2
    return model, torch.randn(2, 5 if device.type == "cpu" else 129, width, device=device, dtype=dtype)


def gradients(model, x, call=None):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.float().square().mean().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("grouped", [False, True])
def test_as_on_a_cpu(grouped, device):
    model, x = converted(device, grouped=grouped)
    plain = copy.deepcopy(model).double()
    for a, b in zip(gradients(model, x), gradients(plain, x.double())):
        assert relative_error(a, b) <= 1e-4


@pytest.mark.parametrize("grouped", [False, True])
def test_compiled(grouped, device, gpu_only):
    """Before anything has run in eager mode: nothing may be kept from inside a graph's memory."""
    for mode in ("reduce-overhead", "default"):
        model, x = converted(device, torch.bfloat16, grouped)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, mode=mode)
        for _ in range(3):  # the third replays the graph of reduce-overhead
            torch.compiler.cudagraph_mark_step_begin()
            got = [t.clone() for t in gradients(model, x, compiled)]
        for a, b in zip(got, gradients(model, x)):
            assert relative_error(a, b) <= 3e-2, mode


def test_exported(device):
    model, x = converted(device)
    program = torch.export.export(model, (x,))
    assert relative_error(program.module()(x), model(x)) <= 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant, device):
    model, x = converted(device)
    want = gradients(model, x)
    got = gradients(model, x, lambda z: torch.utils.checkpoint.checkpoint(model, z, use_reentrant=reentrant))
    for a, b in zip(got, want):
        assert relative_error(a, b) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype, device):
    model, x = converted(device)
    want = gradients(model, x)
    with torch.autocast(device.type, dtype=dtype):
        got = gradients(model, x)
    assert all(g.dtype == torch.float32 for g in got[1:])
    for a, b in zip(got[:2], want):
        assert relative_error(a, b) <= 3e-2


@pytest.mark.parametrize("coupled", [True, False], ids=["penalties in the loss", "decoupled"])
def test_a_training_step_is_that_of_the_formula(coupled, device):
    """Penalties in the loss or decoupled, backward and MaskedAdamW over a few steps, beside the same model in float64,
    which uses the formula."""
    model, x = converted(device)
    plain = copy.deepcopy(model).double()
    coefficients = {} if coupled else {"orthogonality": 1e-2, "spectral_consistency": 1e-3}
    for m, batch in ((model, x), (plain, x.double())):
        optimizer = MaskedAdamW([p for p in m.parameters() if p.requires_grad], lr=1e-3, **coefficients)
        for _ in range(3):
            optimizer.zero_grad()
            task = m(batch).square().mean()
            (task + regularization_loss(m, CONFIG) if coupled else task).backward()
            optimizer.step()
    assert relative_error(model(x), plain(x.double())) <= 1e-3


def test_a_group_lies_side_by_side_after_a_move(device, gpu_only):
    model, _ = converted(device)
    layers = [model[0].query, model[0].key, model[0].value]
    for name in ("principal", "u", "s", "v", "bias", "mask"):
        a, b, c = (getattr(layer, name) for layer in layers)
        assert b.data_ptr() - a.data_ptr() == c.data_ptr() - b.data_ptr() == a.numel() * a.itemsize, name


def test_memory_does_not_grow(device, gpu_only):
    """1,000 steps: what is allocated afterwards, and the highest point, are those of the first steps."""
    model, x = converted(device, torch.bfloat16)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step():
        (model(x).float().square().mean() + regularization_loss(model, CONFIG)).backward()
        for p in parameters:
            p.grad = None

    for _ in range(20):
        step()
    torch.cuda.synchronize()
    before, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    for _ in range(1000):
        step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before and torch.cuda.max_memory_allocated() <= peak


def test_tuning_is_kept_and_not_done_in_a_capture(device, gpu_only, tmp_path):
    target, tiles = Target(90, 132, "a gpu"), (Tile(1, 1, 1, 1, 1), Tile(2, 2, 2, 2, 2))
    x = torch.zeros(1 << 20, device=device)

    def launch(tile):
        for _ in range(20 if tile == tiles[0] else 1):
            x.add_(1)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert tuning.choose(target, "in a capture", tiles, launch, tmp_path) == tiles[0]
    assert tuning.choose(target, "outside", tiles, launch, tmp_path) == tiles[1]
    assert '"outside"' in tuning.cache_file(target, tmp_path).read_text()
    assert '"in a capture"' not in tuning.cache_file(target, tmp_path).read_text()
