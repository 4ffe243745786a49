"""The two products with every weight, and the losses built on them."""

import pytest
import torch
from guarded import guarded
from inputs import POINTERS, TILE, error

from masm_ext import reference
from masm_ext.kernels import subspace_penalty as kernels
from masm_ext.kernels.launch import Tile
from masm_ext.reference.subspace_penalty import weight_products


@pytest.mark.parametrize("tile", [TILE, Tile(16, 64, 0, 4, 2), None], ids=str)
@pytest.mark.parametrize("R", [1, 12, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weight_products(dtype, R, tile):
    weights = [torch.randn(41, 35).to(dtype) for _ in range(3)]
    weights[1] = weights[1].mT.contiguous().mT
    a, b = torch.randn(3, R, 41), torch.randn(3, 35, R).mT
    got = kernels.weight_products(weights, a, b, POINTERS, tile)
    want = weight_products([w.double() for w in weights], a.double(), b.double())
    for x, y in zip(got, want):
        assert x.dtype == torch.float32 and error(x, y) <= 1e-6


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_is_touched_outside_of_the_inputs(at_end):
    weights = [guarded(torch.randn(41, 35), at_end) for _ in range(2)]
    a, b = guarded(torch.randn(2, 5, 41), at_end), guarded(torch.randn(2, 5, 35), at_end)
    got = kernels.weight_products(weights, a, b, POINTERS, TILE)
    for x, y in zip(got, weight_products(weights, a, b)):
        assert error(x, y) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_losses_and_gradients_of_layers_of_two_shapes(dtype):
    shapes = [(40, 36), (24, 40), (40, 36)]
    ranks = [3, 2]
    lists = {
        "weights": [torch.randn(n, d).to(dtype) for n, d in shapes],
        "u": [torch.randn(5, n) / n**0.5 for n, _ in shapes],
        "s": [torch.rand(5) for _ in shapes],
        "v": [torch.randn(5, d) / d**0.5 for _, d in shapes],
        "s0": [torch.rand(5) for _ in shapes],
    }
    norm2 = [w.float().square().sum() for w in lists["weights"]]
    offsets, subspaces = [0, 3, 5] * 3, [len(ranks)] * 3

    def products(*arguments):
        return kernels.weight_products(*arguments, target=POINTERS, tile=TILE)

    wide = [[t.double() for t in ts] for ts in (*lists.values(), norm2)]
    for need in (True, False):
        got = reference.subspace_penalty(*lists.values(), norm2, offsets, subspaces, need, products=products)
        want = reference.subspace_penalty(*wide, offsets, subspaces, need)
        for a, b in zip(got, want):
            assert error(a, b) <= 1e-5
