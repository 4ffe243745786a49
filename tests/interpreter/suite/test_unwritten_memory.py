"""No call returns memory that nothing wrote: new memory is full of NaN here (conftest.py), results are finite."""

import itertools

import pytest
import torch
from inputs import POINTERS, TILE, TMA, draw

from masm_ext.kernels import products, subspace_penalty

STRATEGIES = ("kext", "single", "addmm", "folded", "reference")
#: (M, N, D, ranks): each size 0 by itself, all of them, and none.
SHAPES = [
    *((0, 5, 6, (2, 1)), (9, 0, 6, (2, 1)), (9, 5, 0, (2, 1)), (9, 5, 6, (0, 0)), (9, 5, 6, (3, 0))),
    *((0, 0, 0, (0, 0)), (9, 5, 6, (2, 1))),
]


def finite(tensors):
    return all(torch.isfinite(t).all() for t in tensors)


def test_new_memory_is_poisoned():
    like = torch.zeros(2)
    assert not any(finite([t]) for t in (torch.empty(3), like.new_empty(3), torch.empty_like(like)))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_subspace_linear(shape, strategy):
    for dtype, target in ((torch.float32, POINTERS), (torch.bfloat16, TMA)):
        masks = [[True, False]]
        call = draw(*shape, dtype, masks=masks if dtype == torch.float32 else None)
        for need_p in (False, True):
            y, p = call.forward(strategy, target, need_p=need_p)
            assert finite([*y, p])
        for needs in itertools.product([False, True], repeat=5):
            assert finite(call.backward(p, strategy, target, needs=needs)), needs


@pytest.mark.parametrize("strategy", ["kext", "single", "addmm"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_and_replayed_plans(shape, strategy):
    for masks in (None, [[False, False], [True, False]]):
        call = draw(*shape, torch.bfloat16, layers=2, masks=masks)
        for _ in range(3):  # planned, recorded, replayed
            y, p = call.forward(strategy)
            assert finite([*y, p, *call.backward(p, strategy)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fold_and_penalty(shape):
    call = draw(*shape, torch.bfloat16)
    (weight,), (u,), (s,), (v,) = call.factors
    assert finite([products.fold(weight, u, s, v, POINTERS, TILE)])
    for weights, a, b in (([weight], u[None], v[None]), ([weight, weight], *(torch.stack([t, t]) for t in (u, v)))):
        assert finite(subspace_penalty.weight_products(weights, a, b, POINTERS, TILE))
