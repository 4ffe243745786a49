"""Layers that read the same x, run as one call."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from tolerances import relative_error
from torch import nn

from masm_ext import MASMConfig, MASMLinear, convert, group_projections, merge, unmerge
from masm_ext.nn import layer_group


class Attention(nn.Module):
    def __init__(self, width=24, bias=True):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return self.out_proj(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1) @ v)


def converted(bias=True, dtype=torch.float32):
    model = nn.Sequential(Attention(bias=bias), nn.LayerNorm(24), Attention(bias=bias)).to(dtype)
    convert(model, MASMConfig(target_modules="re:.*proj", subspace_rank=2), use_cache=False, progress=False)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.1 * torch.randn_like(p))
    return model


def gradients(model, x):
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    return [y, x.grad, *[p.grad for p in model.parameters() if p.grad is not None]]


@pytest.fixture
def calls(monkeypatch):
    """How often a group ran."""
    count = []
    original = layer_group.subspace_linear_group
    monkeypatch.setattr(layer_group, "subspace_linear_group", lambda *a, **k: count.append(1) or original(*a, **k))
    return count


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_gives_what_its_layers_give(bias, dtype, calls):
    model = converted(bias, dtype)
    single = copy.deepcopy(model)
    assert group_projections(model) == 2 and group_projections(model) == 0
    model[0].q_proj.mask[0] = single[0].q_proj.mask[0] = False
    x = torch.randn(2, 7, 24, dtype=dtype)
    got, want = gradients(model, x), gradients(single, x)
    assert len(calls) == 2 and len(got) == len(want)
    # dX of three layers is summed in another order. In bfloat16 a ds of six numbers that cancel may move by some
    # percent; layers that were swapped would differ wholly.
    each, together = (1e-5, 1e-5) if dtype == torch.float32 else (1e-1, 2e-2)
    for a, b in zip(got, want):
        assert relative_error(a, b) <= each
    assert relative_error(*(torch.cat([t.flatten() for t in tensors]) for tensors in (got, want))) <= together
    assert model[0].q_proj.u.grad[0].abs().max() == 0 and model[0].k_proj.u.grad[0].abs().max() > 0


class Owner(nn.Module):
    """The module whose forward calls the layers of a group."""

    def forward(self, body):
        return body()


def grouped(count=3):
    model, owner = converted(), Owner()
    layers = [model[0].q_proj, model[0].k_proj, model[0].v_proj][:count]
    single = [copy.deepcopy(layer) for layer in layers]
    MASMLinear.group(layers, owner)
    return owner, layers, single


def test_another_x_or_mode_starts_anew(calls):
    owner, (q, k, _v), (_, want, _) = grouped()
    x = torch.randn(3, 24)

    def body():
        q(x)
        assert torch.equal(k(2 * x), want(2 * x)) and len(calls) == 2
        q(x)
        x.mul_(3)  # the output that waits for k belongs to x as it was
        assert torch.equal(k(x), want(x)) and len(calls) == 4
        with torch.no_grad():
            q(x)
        assert k(x).requires_grad and len(calls) == 6
        with torch.autocast("cpu", dtype=torch.bfloat16):
            q(x)
        assert k(x).dtype == torch.float32 and len(calls) == 8

    owner(body)


def test_an_optimizer_step_between_the_calls_starts_anew(calls):
    owner, (q, k, _v), _ = grouped()
    x = torch.randn(3, 24)

    def body():
        q(x)
        with torch.no_grad():
            k.s.add_(5)
        want = copy.deepcopy(k)
        want.layer_group = None
        assert torch.equal(k(x), want(x)) and len(calls) == 2

    owner(body)


def test_outside_its_owner_every_layer_runs_alone(calls):
    owner, layers, single = grouped()
    x = torch.randn(3, 24)
    assert all(torch.equal(a(x), b(x)) for a, b in zip(layers, single)) and not calls
    owner(lambda: [layer(x) for layer in layers])
    assert len(calls) == 1
    layers[1](x)
    assert len(calls) == 1


def test_in_inference_mode_every_layer_runs_alone(calls):
    """An inference tensor has no version: a change of x between two calls could not be seen."""
    owner, (q, k, _v), (_, want, _) = grouped()
    with torch.inference_mode():
        x = torch.randn(3, 24)

        def body():
            q(x)
            x.mul_(2)
            assert torch.equal(k(x), want(x)) and not calls

        owner(body)


def test_outputs_end_with_the_call_of_the_owner(calls):
    owner, (q, _k, _v), _ = grouped()
    held = []

    def one():  # two outputs are not fetched
        x = torch.randn(3, 24)
        held.append(weakref.ref(x))
        q(x)

    owner(one)
    gc.collect()
    assert held[0]() is None

    def fails():
        q(torch.randn(3, 24))
        raise KeyError("in the model")

    with pytest.raises(KeyError, match="in the model"):
        owner(fails)
    assert q.layer_group._scopes.stack == []


def test_calls_of_the_owner_may_be_nested(calls):
    owner, (q, k, v), (_, want, _) = grouped()
    x, z = torch.randn(3, 24), torch.randn(3, 24)

    def body():
        q(x)
        owner(lambda: (q(z), k(z), v(z)))
        assert torch.equal(k(x), want(x)) and len(calls) == 2  # the outer call's outputs are still there

    owner(body)


def test_a_checkpoint_inside_the_owner_runs_every_layer_alone(calls):
    """Its recomputation runs outside of the owner's forward, and must save what the first run saved."""
    owner, layers, single = grouped()
    for use_reentrant in (True, False):
        x = torch.randn(3, 24, requires_grad=True)

        def body(own=layers, x=x, use_reentrant=use_reentrant):
            return torch.utils.checkpoint.checkpoint(
                lambda x: sum(layer(x) for layer in own), x, use_reentrant=use_reentrant
            )

        owner(body).sum().backward()
        z = x.detach().clone().requires_grad_()
        sum(layer(z) for layer in single).sum().backward()
        assert relative_error(x.grad, z.grad) <= 1e-5


def test_a_checkpoint_around_the_owner_keeps_the_group(calls):
    owner, layers, _ = grouped()
    x = torch.randn(3, 24, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(
        lambda x: owner(lambda: sum(layer(x) for layer in layers)), x, use_reentrant=False
    )
    y.sum().backward()
    assert len(calls) == 2


def test_threads_get_their_own_outputs():
    model = converted()
    single = copy.deepcopy(model)
    group_projections(model)
    xs = [torch.randn(2, 5, 24) for _ in range(4)]
    expected, wrong = [single(x).detach() for x in xs], []

    def work(x, want):
        try:
            for _ in range(60):
                with torch.no_grad():
                    if relative_error(model(x), want) > 1e-5:
                        wrong.append("another output")
        except BaseException as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_copies_and_pickles_of_a_group(calls):
    model = converted()
    group_projections(model)
    x = torch.randn(2, 5, 24)
    want = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls.clear()
        assert torch.equal(twin(x), want) and len(calls) == 2
        own, other = twin[0].q_proj.layer_group, model[0].q_proj.layer_group
        assert own is not other and all(a is not b for a, b in zip(own.layers, other.layers))
    shallow = copy.copy(model[0].q_proj)  # as nn.DataParallel makes them: not a member, runs on its own
    assert torch.equal(shallow(x), model[0].q_proj(x))


def test_compile_export_checkpoint_and_copy():
    model = converted()
    x = torch.randn(2, 5, 24)
    want = gradients(model, x)
    group_projections(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x), want):
        assert relative_error(a, b) <= 1e-5
    program = torch.export.export(model, (x,))
    assert relative_error(program.module()(x), want[0]) <= 1e-5
    for reentrant in (True, False):
        model.zero_grad()
        z = x.clone().requires_grad_()
        y = torch.utils.checkpoint.checkpoint(model, z, use_reentrant=reentrant)
        y.square().mean().backward()
        for a, b in zip([y, z.grad, *[p.grad for p in model.parameters() if p.grad is not None]], want):
            assert relative_error(a, b) <= 1e-5
    twin = copy.deepcopy(model)
    assert twin[0].q_proj.layer_group is not model[0].q_proj.layer_group
    assert twin[0].q_proj.layer_group.layers[1] is twin[0].k_proj


def test_merge_and_state_dict_are_untouched():
    model = converted()
    names = set(model.state_dict())
    group_projections(model)
    assert set(model.state_dict()) == names
    x = torch.randn(2, 5, 24)
    want = model(x)
    merge(model)
    assert relative_error(model(x), want) <= 1e-5
    unmerge(model)
    assert relative_error(model(x), want) <= 1e-6


def test_what_cannot_be_a_group_is_refused():
    model = converted()
    q, k, v = model[0].q_proj, model[0].k_proj, model[0].v_proj
    with pytest.raises(ValueError, match="2 to 4 different layers"):
        MASMLinear.group([q], model[0])
    with pytest.raises(ValueError, match="2 to 4 different layers"):
        MASMLinear.group([q, q], model[0])
    with pytest.raises(ValueError, match="agree in shape"):
        MASMLinear.group([q, k, copy.deepcopy(v).double()], model[0])
    wide = MASMLinear.from_linear(nn.Linear(200, 200), MASMConfig(target_modules="x", subspace_rank=43))
    with pytest.raises(ValueError, match="258 directions together; a group serves 256"):
        MASMLinear.group([wide, copy.deepcopy(wide)], model[0])
    MASMLinear.group([q, k], model[0])
    with pytest.raises(ValueError, match="in a group already"):
        MASMLinear.group([k, v], model[0])
    MASMLinear.ungroup([q])
    assert k.layer_group is None
    MASMLinear.group([q, k, v], model[0])
