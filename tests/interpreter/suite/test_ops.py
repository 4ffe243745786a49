"""The Triton implementations behind the dispatcher: autograd, opcheck, the compiler, autocast and checkpoints.

In this process they serve CPU tensors in place of C++, so that PyTorch sees of them what it sees on a GPU.
"""

import dataclasses

import pytest
import torch
from inputs import POINTERS, draw, error
from torch import nn
from triton_on_cpu import triton_serves_the_cpu

import masm_ext
from masm_ext import MASMConfig, convert, group_projections
from masm_ext.kernels import products, skinny_products, small_batch
from masm_ext.kernels import subspace_linear as linear_on_cuda
from masm_ext.ops import fold, strategies, subspace_linear


@pytest.fixture(scope="module", autouse=True)
def triton_on_cpu():
    with triton_serves_the_cpu():
        yield


@pytest.fixture(params=["", "kext", "single", "addmm", "folded", "reference"])
def strategy(request):
    return request.param


def arguments(call):
    return call.x, *(t[0] for t in call.factors), call.bias[0]


def test_strategies_through_the_public_function(strategy):
    call = draw(40, 24, 32, (2, 3), torch.float32)
    leaves = [t.requires_grad_() for t in arguments(call) if t is not call.weight[0]]
    y = subspace_linear(*arguments(call), offsets=call.offsets, strategy=strategy)
    y.backward(call.dy[0])
    want, _, grads = call.map(lambda t: t.detach()).exact()
    assert error(y, want[0]) <= 1e-6
    for leaf, i in zip(leaves, (0, 1, 2, 3, 4)):
        assert error(leaf.grad, grads[i]) <= 1e-5


def test_opcheck(strategy):
    call = draw(6, 10, 16, (2, 3), torch.float32, layers=2, masks=[[True, False], [True, True]])
    x, weight, u, s, v, bias = (t.requires_grad_() if i not in (1,) else t for i, t in enumerate(arguments(call)))
    mask = call.mask[0]
    op = torch.ops.masm
    torch.library.opcheck(op.subspace_linear.default, (x, weight, u, s, v, bias, mask, call.offsets, True, strategy))
    plain = [t.detach() for t in (x, weight, u, s, v)]
    y, p = op.subspace_linear(*plain, None, None, call.offsets, True, strategy)
    needs = (True, True, True, True, True)
    torch.library.opcheck(op.subspace_linear_backward.default, (y, *plain, p, mask, call.offsets, *needs, strategy))
    flat = call.map(lambda t: t.detach())
    y, p = op.subspace_linear_group(flat.x, *flat.factors, flat.bias, flat.mask, flat.offsets, True, strategy)
    torch.library.opcheck(
        op.subspace_linear_group.default,
        (flat.x, *flat.factors, flat.bias, flat.mask, flat.offsets, True, strategy),
    )
    torch.library.opcheck(
        op.subspace_linear_group_backward.default,
        (y, flat.x, *flat.factors, p, flat.mask, flat.offsets, *needs, strategy),
    )


@pytest.mark.parametrize("lead", [(), (2,)], ids=["matrix", "batch"])
@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_can_be_changed_in_place(layers, lead, strategy):
    """As any op's: they are new memory, not views, however often the call was made."""
    for _ in range(4):
        call = draw(6, 16, 16, (4,), torch.float32, layers=layers)
        x = call.x.view(*lead, -1, 16).requires_grad_()
        if layers == 1:
            ys = [subspace_linear(x, *arguments(call)[1:], strategy=strategy)]
        else:
            factors = (*call.factors, call.bias)
            ys, _ = torch.ops.masm.subspace_linear_group(x, *factors, [], call.offsets, True, strategy)
        sum(y.relu_().sum() for y in ys).backward()
        exact = call.map(lambda t: t.detach())
        want = [y.relu() for y in exact.exact()[0]]
        live = dataclasses.replace(exact, dy=[(y > 0).float() for y in want])
        assert all(error(y.view(-1, 16), w) <= 1e-6 for y, w in zip(ys, want))
        assert error(x.grad.view(-1, 16), live.exact()[2][0]) <= 1e-5


def test_float64_is_served_by_the_formula():
    call = draw(3, 4, 5, (2,), torch.float64)
    leaves = [t.requires_grad_() for i, t in enumerate(arguments(call)) if i != 1]
    x, u, s, v, bias = leaves

    def run(x, u, s, v, bias):
        return subspace_linear(x, call.weight[0], u, s, v, bias)

    assert torch.autograd.gradcheck(run, (x, u, s, v, bias))
    with torch.no_grad():
        assert fold(*(t[0] for t in call.factors)).dtype == torch.float64


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):
        q, k, v = self.query(x), self.key(x), self.value(x)
        return self.out(torch.softmax(q @ k.mT, -1) @ v)


def converted(width=32):
    model = Attention(width)
    convert(model, MASMConfig(target_modules=("query", "key", "value", "out")), use_cache=False, progress=False)
    return model


def gradients(model, x, run=None):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = (model if run is None else run)(x)
    y.float().square().mean().backward()
    return [y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_model_compiled_exported_checkpointed_and_under_autocast(grouped):
    model, x = converted(), torch.randn(2, 5, 32)
    want = gradients(model, x)
    if grouped:
        assert group_projections(model) == 1
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for run in (model, compiled, lambda x: torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)):
        for a, b in zip(gradients(model, x, run), want):
            assert error(a, b) <= 2e-5
    program = torch.export.export(model, (x,))
    assert error(program.module()(x), want[0]) <= 2e-5
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients(model, x)
    assert got[0].dtype == torch.bfloat16 and all(g.dtype == torch.float32 for g in got[1:])
    assert error(got[0], want[0]) <= 3e-2


def test_the_losses_flow_gradients():
    model = converted()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    loss = masm_ext.orthogonality_loss(model) + masm_ext.spectral_consistency_loss(model)
    loss.backward()
    assert float(loss) > 0 and float(model.query.u.grad.norm()) > 0


def test_no_call_reads_a_tensor_on_the_host(monkeypatch):
    """What would wait for a GPU: .item(), bool(tensor), .tolist(), .cpu() in forward or backward."""
    call = draw(40, 24, 32, (2, 3), torch.float32, layers=2, masks=[[True, False], [True, True]])
    waits = []
    for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, *a, n=name, f=original: waits.append(n) or f(t, *a))
    # the launch code alone: what the interpreter does with tensors is not its own
    for module in (products, skinny_products):
        monkeypatch.setattr(module, "run", lambda *a, **k: None)
    for strategy in ("kext", "single", "addmm", "folded"):
        _, p = call.forward(strategy, POINTERS)
        call.backward(p, strategy, POINTERS)
    assert waits == []


@pytest.mark.parametrize("library", [False, True])
def test_the_table_names_only_what_can_serve_a_call(library, monkeypatch):
    """Every strategy is chosen somewhere, and no choice is refused by the kernels."""
    monkeypatch.setattr(small_batch, "available", lambda _: library)
    chosen = set()
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
        for capability in (80, 86, 90, 100, 120):
            for M in (0, 1, 16, 64, 65, 257, 2056, 8224, 32768):
                for OUT, IN in ((1024, 1024), (4096, 1024), (1024, 4096), (384, 384), (7, 5)):
                    for R in (1, 4, 16, 48, 64, 65, 256, 257):
                        for layers in (1, 3, 5):
                            for learning in (True, False):
                                call = strategies.Call(
                                    M, OUT, IN, R, layers, dtype, capability, learning, False, library
                                )
                                dx = dataclasses.replace(call, cuda_library=False, backward=True)
                                for name in (strategies.choose(call), strategies.choose(dx)):
                                    chosen.add(name)
                                    if name != strategies.REFERENCE:
                                        x = torch.empty(M, IN, dtype=dtype, device="meta")
                                        if layers == 1 or not linear_on_cuda._too_many(layers, R):
                                            linear_on_cuda._check_supported("subspace_linear", x, R, layers, name)
    assert chosen == set(strategies.STRATEGIES) - (set() if library else {strategies.STREAM})
