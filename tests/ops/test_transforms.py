"""The ops under torch.func: vmap, grad, jacrev, functional_call; and forward mode, which is refused."""

import pytest
import torch
from tolerances import relative_error
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vjp, vmap

from masm_ext import MASMConfig, MASMLinear, reference
from masm_ext.ops import fold, subspace_linear, subspace_linear_group, subspace_penalty

B, M, N, D, R = 5, 3, 6, 4, 2


def make():
    u, s, v = (torch.randn(shape, dtype=torch.float64) for shape in ((R, N), (R,), (R, D)))
    return torch.randn(B, M, D, dtype=torch.float64), torch.randn(N, D, dtype=torch.float64), u, s, v


def formula(x, w, u, s, v):
    return x @ w.mT + ((x @ v.mT) * s) @ u


def test_vmap_over_x_is_one_call():
    x, *rest = make()
    got = vmap(lambda x: subspace_linear(x, *rest), in_dims=1, out_dims=1)(x.movedim(0, 1))
    assert relative_error(got.movedim(1, 0), formula(x, *rest)) <= 1e-12
    for a, b in zip(
        vmap(lambda x: tuple(subspace_linear_group(x, *([t, t] for t in rest))))(x), [formula(x, *rest)] * 2
    ):
        assert relative_error(a, b) <= 1e-12


@pytest.mark.parametrize("batched", [(0, None, 0, None, None), (None, 0, None, 0, 0), (0, 0, 0, 0, 0)], ids=str)
def test_vmap_over_weights_and_factors(batched):
    one = make()
    x, *rest = (
        torch.randn(B, *t.shape, dtype=torch.float64) if d == 0 else t for t, d in zip((one[0][0], *one[1:]), batched)
    )
    got = vmap(subspace_linear, in_dims=batched)(x, *rest)
    assert relative_error(got, vmap(formula, in_dims=batched)(x, *rest)) <= 1e-12


def test_an_empty_batch():
    x, *rest = make()
    assert vmap(lambda x: subspace_linear(x, *rest))(x[:0]).shape == (0, M, N)
    with pytest.raises(NotImplementedError, match="over an empty batch of parameters"):
        vmap(lambda u: subspace_linear(x[0], rest[0], u, *rest[2:]))(rest[1].expand(0, R, N))


def test_gradients_by_transforms_are_those_of_backward():
    x, w, *factors = make()

    def loss(op):
        return lambda *args: op(args[0], w, *args[1:]).sin().sum()

    for index in range(4):
        got = grad(loss(subspace_linear), argnums=index)(x, *factors)
        assert relative_error(got, grad(loss(formula), argnums=index)(x, *factors)) <= 1e-12
    many = [torch.randn(B, *t.shape, dtype=torch.float64) for t in factors]
    per_sample = vmap(grad(loss(subspace_linear), argnums=(1, 2, 3)))(x, *many)
    for a, b in zip(per_sample, vmap(grad(loss(formula), argnums=(1, 2, 3)))(x, *many)):
        assert relative_error(a, b) <= 1e-12
    jacobian = jacrev(lambda s: subspace_linear(x[0], w, factors[0], s, factors[2]))(factors[1])
    want = jacrev(lambda s: formula(x[0], w, factors[0], s, factors[2]))(factors[1])
    assert relative_error(jacobian, want) <= 1e-12
    y, pull = vjp(lambda x: subspace_linear(x, w, *factors), x)
    assert relative_error(pull(torch.ones_like(y))[0], grad(lambda x: formula(x, w, *factors).sum())(x)) <= 1e-12


def test_second_derivatives_are_refused():
    x, w, u, s, v = make()
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda u: grad(lambda x: subspace_linear(x, w, u, s, v).sin().sum())(x).sum())(u)


def test_the_penalty():
    _, w, u, s, v = make()
    rest = ([s.clone()], [w.square().sum()], [[0, 1, R]])

    def penalty(op):
        return lambda u, s, v: sum(op([w], [u], [s], [v], *rest))

    def plain(weights, u, s, v, s0, norm2, offsets):
        return reference.subspace_penalty(weights, u, s, v, s0, norm2, offsets[0], [2], False)[:2]

    u, v = u + 0.1, v - 0.1
    got = grad(penalty(subspace_penalty), argnums=(0, 1, 2))(u, 2 * s, v)
    for a, b in zip(got, grad(penalty(plain), argnums=(0, 1, 2))(u, 2 * s, v)):
        assert relative_error(a, b) <= 1e-12
    many = [torch.randn(B, *t.shape, dtype=torch.float64) for t in (u, s, v)]
    want = torch.stack([penalty(plain)(*one) for one in zip(*many)])
    assert relative_error(vmap(penalty(subspace_penalty))(*many), want) <= 1e-12
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad(lambda u: grad(penalty(subspace_penalty))(u, s, v).square().sum())(u)


CALLS = {
    "subspace_linear": lambda x, w, u, s, v: subspace_linear(x, w, u, s, v),
    "subspace_linear_group": lambda x, w, u, s, v: subspace_linear_group(x, [w], [u], [s], [v])[0],
    "subspace_penalty": lambda x, w, u, s, v: subspace_penalty(
        [w], [u], [s], [v], [s.detach()], [w.square().sum()], [[0, R]]
    )[0],
    "fold": lambda x, w, u, s, v: fold(w, u, s, v),
}


@pytest.mark.parametrize("op", CALLS)
def test_forward_mode_is_refused(op):
    """An op without a rule gives a zero tangent: a wrong derivative without an error."""
    x, w, u, s, v = make()
    message = f"masm::{op} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        jvp(lambda u: CALLS[op](x, w, u, s, v), (u,), (u,))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(u, torch.ones_like(u))
        with pytest.raises(NotImplementedError, match=message):
            CALLS[op](x, w, dual, s, v)
        CALLS[op](x, w, u, s, v)  # nothing dual among the arguments


def test_fold_has_no_gradient():
    _, w, u, s, v = make()
    with pytest.raises(NotImplementedError, match="fold has no gradient"):
        grad(lambda u: fold(w, u, s, v).sum())(u)
    assert vmap(lambda u: fold(w, u, s, v))(u.expand(B, R, N)).shape == (B, N, D)


def test_functional_call_of_a_layer():
    layer = MASMLinear.from_linear(nn.Linear(D, N), MASMConfig(num_subspaces=2, subspace_rank=1)).double()
    x = torch.randn(B, D, dtype=torch.float64)
    values = {name: p.detach() + 0.1 for name, p in layer.named_parameters() if p.requires_grad}

    def loss(values, x):
        return functional_call(layer, values, (x,)).sin().sum()

    want = formula(x, layer.principal, values["u"], values["s"], values["v"]) + layer.bias
    assert relative_error(functional_call(layer, values, (x,)), want) <= 1e-12
    per_sample = vmap(grad(loss), in_dims=(None, 0))(values, x[:, None])
    assert set(per_sample) == {"u", "s", "v"} and per_sample["u"].shape == (B, 2, N)
    whole = grad(loss)(values, x)
    assert all(relative_error(per_sample[k].sum(0), whole[k]) <= 1e-12 for k in whole)


def test_the_raw_op_says_what_to_call():
    x, w, u, s, v = make()
    raw = torch.ops.masm.subspace_linear
    with pytest.raises(NotImplementedError, match=r"call masm_ext\.ops\.subspace_linear instead"):
        grad(lambda u: raw(x, w, u, s, v, None, None, [0, R])[0].sum())(u)
