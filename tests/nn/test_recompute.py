from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn

from masm_ext import MASMConfig, convert, recompute_inputs


class Block(nn.Module):
    """Pre-norm transformer block, as in a vision transformer."""

    def __init__(self, width=24):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.fc1, self.fc2, self.act = nn.Linear(width, 4 * width), nn.Linear(4 * width, width), nn.GELU()

    def forward(self, x):
        h = self.norm1(x)
        split = (self.q(h), self.k(h), self.v(h))
        x = x + self.out(nn.functional.scaled_dot_product_attention(*(t.unsqueeze(1) for t in split)).squeeze(1))
        return x + self.fc2(self.act(self.fc1(self.norm2(x))))


def make():
    model = nn.Sequential(Block(), Block())
    convert(model, MASMConfig(num_subspaces=2, subspace_rank=2, target_modules=["q", "k", "v", "out", "fc1", "fc2"]))
    return model, torch.randn(3, 10, 24, requires_grad=True)


def gradients(model, x, recompute):
    for t in (x, *model.parameters()):
        t.grad = None
    with recompute_inputs(model) if recompute else nullcontext():
        y = model(x)
    y.square().sum().backward()
    return [x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


def saved_of(model, x, recompute):
    """Distinct tensors of the shape of x, or four times as wide, that the backward pass holds."""
    held = set()
    plain = torch.autograd.graph.saved_tensors_hooks

    class Spy(plain):
        def __init__(self, pack, unpack):
            def watched(t):
                kept = pack(t)
                if isinstance(kept, torch.Tensor) and kept.shape[:-1] == x.shape[:-1]:
                    held.add((kept.data_ptr(), kept.shape))
                return kept

            super().__init__(watched, unpack)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.autograd.graph, "saved_tensors_hooks", Spy)
        if recompute:
            with recompute_inputs(model):
                y = model(x)
        else:
            with Spy(lambda t: t, lambda t: t):
                y = model(x)
    return held, y


def test_gradients_are_the_same_bit_for_bit():
    model, x = make()
    want = gradients(model, x, recompute=False)
    got = gradients(model, x, recompute=True)
    assert len(want) > 20 and all(torch.equal(a, b) for a, b in zip(got, want))


def test_outputs_of_norms_and_activations_are_not_kept():
    model, x = make()
    outputs = []
    hooks = [
        m.register_forward_hook(lambda m, a, y: outputs.append(y))
        for m in model.modules()
        if isinstance(m, (nn.LayerNorm, nn.GELU))
    ]
    kept, y = saved_of(model, x, recompute=False)
    assert {(t.data_ptr(), t.shape) for t in outputs} <= kept
    outputs.clear()
    kept, y = saved_of(model, x, recompute=True)
    assert len(outputs) == 6 and not {(t.data_ptr(), t.shape) for t in outputs} & kept
    del y
    for hook in hooks:
        hook.remove()


def test_one_computation_serves_q_k_and_v(monkeypatch):
    model, x = make()
    calls = []
    forward = nn.LayerNorm.forward
    counted = lambda norm, x: (calls.append(1) if norm is model[1].norm1 else None) or forward(norm, x)  # noqa: E731
    monkeypatch.setattr(nn.LayerNorm, "forward", counted)
    with recompute_inputs(model):
        y = model(x)
    assert len(calls) == 1
    factors = [model[1].q.v, model[1].k.v, model[1].v.v]
    first = torch.autograd.grad(y.sum(), factors, retain_graph=True)
    assert len(calls) == 2
    second = torch.autograd.grad(y.sum(), factors)  # a second pass over the same graph rebuilds once more
    assert len(calls) == 3 and all(torch.equal(a, b) for a, b in zip(first, second))


def test_only_the_modules_asked_for():
    model, x = make()
    calls = []
    forward = model[0].act.forward
    model[0].act.forward = lambda x: calls.append(1) or forward(x)
    with recompute_inputs(model, modules=[model[0].norm1]):
        y = model(x)
    y.sum().backward()
    assert len(calls) == 1


def test_an_input_changed_in_place_is_refused():
    model, x = make()
    norm = nn.LayerNorm(24)
    with recompute_inputs(model, modules=[norm]):
        base = x * 1
        y = model[0].q(norm(base))
    with torch.no_grad():
        base.mul_(2)
    with pytest.raises(RuntimeError, match=r"recompute_inputs: .* changed in place"):
        y.sum().backward()


def test_weights_of_a_norm_that_changed_are_refused():
    model, x = make()
    with recompute_inputs(model):
        y = model(x)
    with torch.no_grad():
        model[1].norm1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"recompute_inputs: .* changed in place"):
        y.sum().backward()


def test_a_mask_that_changed_is_refused():
    model, x = make()
    with recompute_inputs(model):
        y = model(x)
    model[0].q.mask.fill_(False)
    with pytest.raises(RuntimeError, match=r"recompute_inputs: .* changed in place"):
        y.sum().backward()


@pytest.mark.parametrize("act", [nn.SiLU(inplace=True), nn.ReLU(), nn.Mish(), nn.GELU(approximate="tanh")], ids=str)
def test_activations_of_every_kind(act):
    layer = make()[0][0].q
    x = torch.randn(5, 24, requires_grad=True)
    want = torch.autograd.grad(layer(act(x * 2)).square().sum(), layer.v)[0]
    with recompute_inputs(nn.ModuleList([act, layer])):
        y = layer(act(x * 2))
    assert torch.equal(torch.autograd.grad(y.square().sum(), layer.v)[0], want)


def test_a_module_with_a_hook_of_its_own_keeps_its_output():
    model, x = make()
    model[0].norm1.register_forward_hook(lambda m, a, y: y * 2)
    want = gradients(model, x, recompute=False)
    got = gradients(model, x, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


class IntoArray(torch.autograd.Function):
    """x, in the memory of an array: a new tensor each time, as an allocator that reuses memory would give."""

    @staticmethod
    def forward(ctx, x, array):
        array[...] = x.detach().numpy()
        return torch.from_numpy(array)

    @staticmethod
    def backward(ctx, g):
        return g, None


def test_memory_that_is_reused_is_not_mistaken():
    model, x = make()
    layer, array = model[0].q, np.zeros((3, 10, 24), np.float32)
    (want,) = torch.autograd.grad(layer(x * 2).sum(), layer.v)

    class Module(nn.Module):
        def forward(self, x):
            return IntoArray.apply(x * 3, array)

    module = Module()
    with recompute_inputs(model, modules=[module]):
        gone = module(x)
        memory = gone.data_ptr()
        del gone
        h = IntoArray.apply(x * 2, array)
        assert h.data_ptr() == memory
        y = layer(h)
    assert torch.equal(torch.autograd.grad(y.sum(), layer.v)[0], want)


def test_hooks_are_gone_afterwards():
    model, _ = make()
    with pytest.raises(ZeroDivisionError), recompute_inputs(model):
        raise ZeroDivisionError
    assert not any(m._forward_hooks for m in model.modules())


def test_autocast():
    model, x = make()
    with torch.autocast("cpu", torch.bfloat16):
        want = gradients(model, x, recompute=False)
        got = gradients(model, x, recompute=True)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


class NoisyLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x) + torch.randn_like(x)


def own_forward(norm):
    forward = norm.forward
    norm.forward = lambda x: forward(x) + torch.randn_like(x)
    return norm


@pytest.mark.parametrize("make", [NoisyLayerNorm, lambda n: own_forward(nn.LayerNorm(n))], ids=["subclass", "instance"])
def test_a_norm_that_draws_noise_does_not_run_again(make):
    model = nn.Sequential(nn.Linear(16, 16), make(16), nn.Linear(16, 16))
    config = MASMConfig(target_modules=["2"], num_subspaces=2, subspace_rank=2)
    convert(model, config, use_cache=False, progress=False)
    model[0].requires_grad_(True)
    x, dy, grads = torch.randn(64, 16), torch.randn(64, 16), []
    for context in (nullcontext(), recompute_inputs(model)):
        model.zero_grad()
        torch.manual_seed(3)
        with context:
            y = model(x)
        y.backward(dy)
        grads.append(model[2].v.grad.clone())
    assert torch.equal(*grads)
