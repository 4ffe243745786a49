"""J layers on the same x as one op; on a CPU it runs layer by layer."""

import itertools

import pytest
import torch
from tolerances import GRADIENT, RELATIVE, factor_terms, relative_error

from masm_ext import reference
from masm_ext.ops import subspace_linear_group

NAMES = ("weight", "u", "s", "v", "bias")


def make(J, shape, N, D, ranks, dtype, factor_dtype=None, bias=True):
    R, f = sum(ranks), factor_dtype or dtype
    lists = {
        "weight": [(torch.randn(N, D, dtype=torch.float64) / D**0.5).to(dtype) for _ in range(J)],
        "u": [torch.randn(R, N, dtype=torch.float64).to(f) for _ in range(J)],
        "s": [torch.rand(R, dtype=torch.float64).to(f) for _ in range(J)],
        "v": [(torch.randn(R, D, dtype=torch.float64) / D**0.5).to(f) for _ in range(J)],
        "bias": [torch.randn(N, dtype=torch.float64).to(dtype) for _ in range(J if bias else 0)],
    }
    return torch.randn(*shape, D, dtype=torch.float64).to(dtype), lists, [0, *itertools.accumulate(ranks)]


def leaves(lists):
    return [t.requires_grad_() for name in NAMES[1:] for t in lists[name]]


@pytest.mark.parametrize("J", [1, 2, 3, 5])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [
        *((d, d) for d in (torch.float32, torch.float64)),
        *((d, torch.float32) for d in (torch.bfloat16, torch.float16)),
    ],
    ids=str,
)
def test_outputs_and_gradients_match_float64_autograd(J, bias, dtype, factor_dtype):
    x, lists, offsets = make(J, (3, 7), 10, 6, (2, 1), dtype, factor_dtype, bias)
    exact = {name: [t.detach().double().clone().requires_grad_() for t in lists[name]] for name in NAMES}
    x64 = x.double().clone().requires_grad_()
    want, _ = reference.subspace_linear_group(x64, *exact.values(), [], offsets)
    x.requires_grad_()
    inputs = [x, *leaves(lists)]
    got = subspace_linear_group(x, *lists.values(), offsets=offsets)
    assert len(got) == J
    dy = [torch.randn(3, 7, 10, dtype=torch.float64).to(dtype) for _ in range(J)]
    torch.autograd.backward(got, dy)
    torch.autograd.backward(want, [d.double() for d in dy])
    for a, b in zip(got, want):
        assert relative_error(a, b) <= RELATIVE[dtype]
    assert all(t.grad.dtype == t.dtype for t in inputs)
    assert relative_error(x.grad, x64.grad) <= 2 * GRADIENT[dtype]  # on a CPU dX is rounded after each layer
    for j in range(J):
        terms = factor_terms(x64, *(exact[name][j] for name in "usv"), dy[j])
        for name in ("u", "v", "bias") if bias else ("u", "v"):
            error = relative_error(lists[name][j].grad, exact[name][j].grad, terms.get(name))
            assert error <= GRADIENT[dtype], (name, j)
        error = (lists["s"][j].grad.double() - exact["s"][j].grad).norm()
        assert error <= GRADIENT[dtype] * terms["s"].norm()


def test_masks_are_those_of_the_layers():
    x, lists, offsets = make(2, (9,), 6, 5, (2, 2), torch.float64)
    leaves(lists)
    mask = [torch.tensor([True, False]), torch.tensor([False, False])]
    torch.autograd.backward(
        subspace_linear_group(x, *lists.values(), offsets=offsets, mask=mask), [torch.randn(9, 6).double()] * 2
    )
    for name in ("u", "s", "v"):
        first, second = (t.grad for t in lists[name])
        assert first[:2].abs().min() > 0 and first[2:].abs().max() == 0 and second.abs().max() == 0


def test_an_output_that_is_not_used():
    x, lists, offsets = make(2, (4,), 6, 5, (2,), torch.float64)
    leaves(lists)
    y = subspace_linear_group(x.requires_grad_(), *lists.values(), offsets=offsets)
    y[1].sum().backward()
    assert lists["u"][0].grad.abs().max() == 0 and lists["u"][1].grad.abs().max() > 0
    want = reference.subspace_linear_backward(
        *(torch.ones(4, 6).double(), x.detach(), *(lists[n][1].detach() for n in NAMES[:4])),
        *(x.detach() @ lists["v"][1].detach().mT, None, offsets),
    )[0]
    assert relative_error(x.grad, want) <= GRADIENT[torch.float64]


@pytest.mark.parametrize("frozen", [("u", "s"), ("v",), ("u", "s", "v")], ids=str)
def test_only_what_is_asked_for_is_computed(frozen):
    x, lists, offsets = make(2, (4,), 6, 5, (2,), torch.float64)
    for name in {"u", "s", "v"} - set(frozen):
        for t in lists[name]:
            t.requires_grad_()
    exact = [[t.detach().clone().requires_grad_(t.requires_grad) for t in ts] for ts in lists.values()]
    x.requires_grad_()
    x64 = x.detach().clone().requires_grad_()
    sum(y.sum() for y in subspace_linear_group(x, *lists.values(), offsets=offsets)).backward()
    sum(y.sum() for y in reference.subspace_linear_group(x64, *exact, [], offsets)[0]).backward()
    for a, b in zip([x, *(t for ts in lists.values() for t in ts)], [x64, *(t for ts in exact for t in ts)]):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or relative_error(a.grad, b.grad) <= GRADIENT[torch.float64]


def test_opcheck_and_gradcheck():
    x, lists, offsets = make(2, (2, 3), 4, 5, (2, 1), torch.float64)
    mask = [torch.tensor([True, False]), torch.tensor([True, True])]
    weight, *others = lists.values()
    inputs = (x.requires_grad_(), weight, *([t.requires_grad_() for t in ts] for ts in others), mask, offsets)
    torch.library.opcheck(torch.ops.masm.subspace_linear_group.default, (*inputs, True, ""))
    plain = [t.detach() if isinstance(t, torch.Tensor) else [i.detach() for i in t] for t in inputs[:6]]
    y, p = torch.ops.masm.subspace_linear_group(*plain, mask, offsets, True, "")
    torch.library.opcheck(
        torch.ops.masm.subspace_linear_group_backward.default,
        (y, *plain[:5], p, mask, offsets, True, True, False, True, True, ""),
    )

    def run(x, *flat):
        u, s, v, bias = (list(flat[2 * i : 2 * i + 2]) for i in range(4))
        return tuple(subspace_linear_group(x, weight, u, s, v, bias, offsets=offsets))

    assert torch.autograd.gradcheck(run, (x, *(t for ts in others for t in ts)))


def test_what_does_not_fit_is_refused():
    x, lists, offsets = make(2, (4,), 6, 5, (2,), torch.float32)
    with pytest.raises(RuntimeError, match="strategy 'kext' is one of CUDA's"):
        subspace_linear_group(x, *lists.values(), offsets=offsets, strategy="kext")
    with pytest.raises(RuntimeError, match="frozen principal subspace"):
        lists["weight"][0].requires_grad_()
        subspace_linear_group(x.requires_grad_(), *lists.values(), offsets=offsets)[0].sum().backward()
