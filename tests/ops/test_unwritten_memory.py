"""No op returns unwritten memory: torch.empty gives NaN here, and outputs are compared with the formula."""

import itertools

import pytest
import torch
from op_calls import OPS, formula, kernel
from tolerances import RELATIVE, relative_error

from masm_ext import MASMConfig, MASMLinear


@pytest.fixture(autouse=True)
def poison():
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def outputs(result):
    flat = result if isinstance(result, (list, tuple)) else [result]
    return [t for item in flat for t in (item if isinstance(item, (list, tuple)) else [item])]


def assert_same(got, want):
    for a, b in zip(outputs(got), outputs(want), strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # NaN is not close to anything


@pytest.mark.parametrize("op", [op for op in OPS if not op.endswith("_")])
def test_every_op(op):
    args = OPS[op]()
    assert_same(kernel(op)(*args.values()), formula(op)(*args.values()))


@pytest.mark.parametrize("op", ["subspace_linear_backward", "subspace_linear_group_backward"])
@pytest.mark.parametrize("mask", [(True, True), (True, False), (False, False)], ids=str)
def test_every_combination_of_needs(op, mask):
    args = OPS[op]()
    masks = torch.tensor(mask)
    args["mask"] = [masks.clone() for _ in args["mask"]] if isinstance(args["mask"], list) else masks
    for needs in itertools.product([True, False], repeat=5):
        args |= dict(zip(("need_dx", "need_du", "need_ds", "need_dv", "need_dbias"), needs))
        assert_same(kernel(op)(*args.values()), formula(op)(*args.values()))


@pytest.mark.parametrize("need_p", [True, False])
@pytest.mark.parametrize(
    ("M", "N", "D", "R"), [(0, 6, 5, 3), (4, 0, 5, 3), (4, 6, 0, 3), (4, 6, 5, 0), (0, 0, 0, 0), (300, 40, 30, 17)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_empty_sizes(M, N, D, R, dtype, need_p):
    offsets = [0, R // 2, R]
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((M, D), (N, D), (N,)))
    u, s, v = torch.randn(R, N), torch.rand(R), torch.randn(R, D)
    for mask in (None, torch.tensor([True, False]), torch.tensor([False, False])):
        call = (x, weight, u, s, v, bias, mask, offsets, need_p)
        got, want = torch.ops.masm.subspace_linear(*call), formula("subspace_linear")(*call, "")
        assert got[0].shape == want[0].shape and got[0].isfinite().all()
        assert relative_error(got[0], want[0]) <= RELATIVE[dtype]
        assert got[1].shape == want[1].shape and got[1].isfinite().all()
        dy, p = torch.randn(M, N).to(dtype), want[1] if need_p else torch.zeros(M, R)
        call = (dy, x, weight, u, s, v, p, mask, offsets, True, True, True, True, True, "")
        for a, b in zip(torch.ops.masm.subspace_linear_backward(*call), formula("subspace_linear_backward")(*call)):
            assert a.shape == b.shape and a.isfinite().all()
    folded = torch.ops.masm.fold(weight, u, s, v)
    assert folded.shape == (N, D) and folded.isfinite().all()


def test_the_optimizer_ops_write_all_they_return():
    args = OPS["masked_adamw_"]()
    stats, found = kernel("masked_adamw_")(*args.values())
    assert stats.isfinite().all() and found.item() == 0  # block 1 owns no segment
    args["found_inf"].fill_(1)
    stats, found = kernel("masked_adamw_")(*args.values())
    assert stats.abs().max() == 0 and found.item() == 1


def test_a_layer_and_its_gradients():
    layer = MASMLinear.from_linear(torch.nn.Linear(24, 16), MASMConfig(num_subspaces=2, subspace_rank=3))
    for mask in ([True, True], [False, True], [False, False]):
        layer.mask.copy_(torch.tensor(mask))
        for x in (torch.randn(7, 24), torch.randn(0, 24), torch.randn(24)):
            layer.zero_grad()
            y = layer(x.requires_grad_())
            y.sum().backward()
            assert y.isfinite().all() and x.grad.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
