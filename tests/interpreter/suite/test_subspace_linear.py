"""Every kernel and strategy of subspace_linear against float64."""

import itertools
import mmap

import pytest
import torch
from guarded import guarded, untouchable
from inputs import POINTERS, TILE, TMA, TOLERANCE, Call, check, draw, error

from masm_ext import reference
from masm_ext.kernels import operands, products
from masm_ext.kernels.launch import Tile
from masm_ext.kernels.tiles import both_max_rank

STRATEGIES = ("kext", "single", "addmm", "folded")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = {  # M, N, D, ranks: odd, one, none; R not a multiple of 16; K = 1 .. 5
    "odd": (37, 33, 35, (3, 5)),
    "aligned": (70, 48, 64, (8, 8)),
    "one": (1, 1, 1, (1,)),
    "wide": (33, 72, 40, (1, 2, 3, 4, 7)),
    "no rows": (0, 8, 16, (2, 1)),
    "no inputs": (5, 8, 0, (2,)),
    "no outputs": (5, 0, 8, (2,)),
    "no directions": (5, 8, 16, (0,)),
}


def positive(t):
    """No sum of such numbers cancels, so that its relative error means something where it has two or three terms."""
    return t.abs() if t.is_floating_point() else t


@pytest.fixture(autouse=True)
def exact_float32():
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    yield
    torch.backends.cuda.matmul.fp32_precision = "ieee"


@pytest.mark.parametrize("target", [POINTERS, TMA], ids=["pointers", "tma"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ["odd", "aligned"])
def test_forward_and_gradients(shape, dtype, strategy, target):
    check(draw(*SHAPES[shape], dtype), strategy, target)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [s for s in SHAPES if s not in ("odd", "aligned")])
def test_small_and_empty_shapes(shape, strategy):
    check(draw(*SHAPES[shape], torch.float32).map(positive), strategy, TMA)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("target", [POINTERS, TMA], ids=["pointers", "tma"])
def test_tf32_where_torch_allows_it(strategy, target):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    call = draw(*SHAPES["aligned"], torch.float32)
    check(call, strategy, target, precision="tf32")
    if strategy != "folded":  # cuBLAS, which on this machine is a CPU's product
        y = call.forward(strategy, target)[0][0]
        assert error(y, call.exact()[0][0]) > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_factors_in_the_dtype_of_x(dtype, strategy):
    check(draw(*SHAPES["odd"], dtype, factor_dtype=dtype), strategy)


@pytest.mark.parametrize(("ranks", "strategy"), [((64,), "single"), ((40, 33), "kext"), ((100, 156), "addmm")], ids=str)
def test_ranks_of_several_tiles(ranks, strategy):
    """More than one chunk in the extension, in the skinny passes, and no common pass over dY."""
    check(draw(40, 36, 44, ranks, torch.float32), strategy)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layers", [2, 3, 4])
@pytest.mark.parametrize("target", [POINTERS, TMA], ids=["pointers", "tma"])
def test_groups(layers, strategy, target):
    masks = [[True, False], [True, True], [False, False], [False, True]][:layers]
    check(draw(37, 40, 64, (3, 5), torch.float16, layers=layers, masks=masks), strategy, target)


def test_layers_are_read_in_place_only_where_they_lie_side_by_side():
    whole = torch.randn(3, 4, 5)
    for tensors in (whole.unbind(0), whole.flip(0).unbind(0), whole[[0, 1, 2]].unbind(0)):
        assert operands.side_by_side(tensors).data_ptr() == tensors[0].data_ptr()
    for tensors in (
        whole.unbind(0)[::-1],
        [whole[0], whole[2]],
        [whole[0], whole[1].clone()],
        [whole[0], whole[0]],
        whole.mT.unbind(0),
        list(torch.randn(3, 4, 10)[..., :5]),
    ):
        together = operands.side_by_side(tensors)
        assert together.data_ptr() != tensors[0].data_ptr()
        assert torch.equal(together, torch.cat(list(tensors)))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_group_that_lies_side_by_side(strategy):
    call = draw(37, 40, 64, (3, 5), torch.float16, layers=3, masks=[[True, False]] * 3)
    lists = [list(torch.stack(ts).unbind(0)) for ts in (*call.factors, call.bias, call.mask)]
    check(Call(call.x, *lists, call.offsets, call.dy), strategy, TMA)


@pytest.mark.parametrize("strategy", ["kext", "single"])
def test_groups_whose_tiles_do_not_end_with_a_layer(strategy):
    check(draw(37, 33, 35, (3, 5), torch.float32, layers=3), strategy)
    # dX by TMA needs N to be a multiple of the tile's inner dimension; 40 is not
    check(draw(33, 40, 32, (3,), torch.bfloat16, layers=2, bias=False), strategy, TMA)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("ranks", [(3, 2, 4), (30, 20, 40)], ids=str)
def test_masked_blocks(ranks, mask):
    check(draw(70, 33, 37, ranks, torch.float32, masks=[mask]), "kext")


def test_masked_blocks_are_not_read():
    """NaN in the columns of P where only a masked block's gradient would look; x and P out of reach."""
    call = draw(70, 33, 37, (3, 5), torch.float32, masks=[[False, True]])
    _, p = call.forward("kext")
    p[:, :3] = float("nan")
    for needs in ((True,) * 5, (False, True, True, True, False)):
        grads = call.backward(p, "kext", needs=needs)
        assert all(g.isfinite().all() for g in grads)
        assert grads[1][:3].abs().max() == 0 and grads[1][3:].abs().min() > 0
    # where nothing is live neither x nor P is touched
    call = draw(70, 33, 37, (3, 5), torch.float32, masks=[[False, False]])
    call.x, p = untouchable(70, 37, dtype=torch.float32), untouchable(70, 8, dtype=torch.float32)
    for needs in ((True,) * 5, (False, True, True, True, False)):
        grads = call.backward(p, "kext", needs=needs)
        assert all(g.abs().max() == 0 for g in grads[1:4])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_combination_of_needs(strategy):
    call = draw(40, 20, 24, (2, 3), torch.float32, masks=[[True, False]])
    for needs in itertools.product([False, True], repeat=5):
        check(call, strategy, needs=needs)
        grads = call.backward(call.exact()[1].float(), strategy, needs=needs)
        assert [g.numel() > 0 for g in grads] == list(needs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_p_has_no_columns_if_it_is_not_read(strategy):
    call = draw(40, 20, 24, (2, 3), torch.float32)
    y, p = call.forward(strategy, need_p=False)
    assert p.shape == (40, 0) and error(y[0], call.exact()[0][0]) <= TOLERANCE[torch.float32][0]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs(strategy, dtype):
    call = draw(37, 24, 32, (3, 5), dtype)

    def transposed(t):
        return t.mT.contiguous().mT if t.dim() == 2 else torch.stack([t, t], -1)[..., 0]

    def strided(t):
        return torch.stack([t, torch.full_like(t, float("nan")) if t.is_floating_point() else t], -1)[..., 0]

    def rows_of_a_wider_matrix(t):
        return torch.cat([t, torch.full_like(t, float("nan"))], -1)[..., : t.shape[-1]]

    for layout in (transposed, strided, rows_of_a_wider_matrix):
        check(call.map(layout), strategy, TMA)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("layers", "shape"), [(1, "odd"), (1, "one"), (2, "odd")])
def test_nothing_is_touched_outside_of_the_inputs(strategy, layers, shape, at_end):
    """Memory beyond an input may not be read: the page behind (or before) it would end this process."""
    masks = [[True] * len(SHAPES[shape][3])] * layers
    call = draw(*SHAPES[shape], torch.float32, layers=layers, masks=masks).map(positive)
    call = call.map(lambda t: guarded(t, at_end))
    y, p = call.forward(strategy)
    check(call, strategy, got=(y, guarded(p, at_end)))


@pytest.mark.parametrize("strategy", ["kext", "single", "addmm"])
def test_nothing_is_written_outside_of_the_outputs(strategy, monkeypatch):
    """Every new tensor of the launch code is guarded too, its parts of sums included."""
    call = draw(*SHAPES["odd"], torch.float32, layers=2, masks=[[True, False]] * 2)
    want = call.backward(call.exact()[1].float(), strategy)
    plain = torch.Tensor.new_empty
    for at_end in (True, False):

        def new_empty(self, *shape, at_end=at_end, **options):
            t = plain(self, *shape, **options)
            return guarded(t, at_end)  # poisoned by the fixture of this folder

        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "new_empty", new_empty)
            _, p = call.forward(strategy)
            got = call.backward(p, strategy)
        for a, b in zip(got, want):
            assert error(a, b) <= 1e-5


@pytest.mark.parametrize("tile", [Tile(16, 64, 16, 4, 2), Tile(64, 16, 64, 4, 2), Tile(128, 128, 128, 8, 3)], ids=str)
@pytest.mark.parametrize("strategy", ["kext", "single"])
def test_other_tiles_give_the_same(strategy, tile):
    check(draw(70, 48, 64, (3, 5), torch.float16), strategy, TMA, tile)
    check(draw(70, 33, 37, (3, 5), torch.float32), strategy, POINTERS, tile)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("M", [5, 70])
def test_default_tiles(strategy, M):
    """Without a tile the first of the list serves here, where nothing can be timed."""
    check(draw(M, 33, 64, (3, 5), torch.bfloat16), strategy, TMA, None)


@pytest.mark.parametrize(
    ("dtype", "goal"), [(torch.bfloat16, 0.95), (torch.float16, 0.95), (torch.float32, 0.9999)], ids=str
)
@pytest.mark.parametrize("strategy", ["kext", "single", "addmm"])
def test_subspace_fidelity(strategy, dtype, goal):
    """docs/method.md, Numerics: the change of y when s moves by 1%, against float64; the rounding of y is included.

    Beside a dense product a half-precision y cannot show so small a change: there the low-rank path is looked at."""
    D = 256
    u, s, v = torch.linalg.svd(torch.randn(D, D, dtype=torch.float64))
    s = (torch.arange(1, D + 1, dtype=torch.float64)).rsqrt()
    call = draw(256, D, D, (16,), dtype, bias=False)
    call.u, call.s, call.v = [u[:, -16:].mT.float()], [s[-16:].float()], [v[-16:].float()]
    call.weight = [((u[:, :-16] * s[:-16]) @ v[:-16]).to(dtype)]
    if dtype != torch.float32:
        call.weight[0].zero_()
    moved = call.map(lambda t: t)
    moved.s = [call.s[0] * (1 + 0.01 * torch.randn(16).sign())]
    change = moved.forward(strategy)[0][0].double() - call.forward(strategy)[0][0].double()
    exact = moved.exact()[0][0] - call.exact()[0][0]
    cosine = torch.nn.functional.cosine_similarity(change.flatten(), exact.flatten(), 0)
    assert cosine >= goal, float(cosine)


def test_half_precision_keeps_small_singular_values():
    """P * s of 1e-8 is below float16's smallest number; the low-rank path carries it in float32."""
    call = draw(33, 32, 32, (4,), torch.float16, bias=False)
    call.weight[0].zero_()
    call.s = [torch.full((4,), 1e-8)]
    call.u = [1e6 * call.u[0]]
    for strategy in ("kext", "single"):
        assert error(call.forward(strategy)[0][0], call.exact()[0][0]) <= 2e-3


def test_large_offsets_do_not_overflow():
    """The last rows of an x of more than 2^31 elements; of its 4 GiB only the pages of a few rows are ever touched."""
    rows, D = 40, 8
    stride = 2**31 // rows + 8
    memory = mmap.mmap(-1, 2 * (rows * stride + D))
    x = torch.frombuffer(memory, dtype=torch.float16).as_strided((rows, D), (stride, 1))
    call = draw(rows, 16, D, (3,), torch.float16)
    call.x = x.copy_(call.x)
    for strategy in ("kext", "single"):
        check(call, strategy)


def test_fold():
    for dtype in DTYPES:
        call = draw(1, 70, 37, (3, 30), dtype)
        weight, u, s, v = (t[0] for t in call.factors)
        for w in (weight, weight.mT.contiguous().mT):
            got = products.fold(w, u, s, v, POINTERS, TILE)
            want = reference.fold(weight.double(), u.double(), s.double(), v.double())
            assert got.dtype == dtype and error(got, want) <= TOLERANCE[dtype][0]


def test_what_a_strategy_cannot_serve_is_refused():
    with pytest.raises(RuntimeError, match="no strategy 'fastest'; there are kext, single"):
        draw(3, 4, 5, (2,), torch.float32).forward("fastest")
    with pytest.raises(RuntimeError, match="does not serve float64"):
        draw(3, 4, 5, (2,), torch.float64).forward("kext")
    with pytest.raises(RuntimeError, match="serves R <= 64, not 65"):
        draw(3, 4, 5, (65,), torch.float32).forward("single")
    with pytest.raises(RuntimeError, match=r"R <= 256 together and 4 layers"):
        draw(3, 4, 5, (257,), torch.float32).forward("kext")
    with pytest.raises(RuntimeError, match=r"R <= 256 together and 4 layers"):
        draw(3, 4, 5, (2,), torch.float32, layers=5).forward("kext")
    check(draw(3, 4, 5, (300,), torch.float32, layers=5), "reference")


def test_both_products_are_used_up_to_their_rank(monkeypatch):
    """One pass over dY serves Q and du up to some R, two passes serve more."""
    from masm_ext.kernels import subspace_linear as kernels

    calls = []
    original = kernels.both_products
    monkeypatch.setattr(kernels, "both_products", lambda *a, **k: calls.append(1) or original(*a, **k))
    for dtype, most in ((torch.float16, 64), (torch.float32, 16)):
        assert both_max_rank(dtype, "ieee") == most
        for R, expected in ((most, 1), (most + 1, 0)):
            calls.clear()
            check(draw(33, 20, 24, (R,), dtype), "kext")
            assert len(calls) == expected


def test_dx_behind_stream_is_that_of_single():
    """`stream` is a forward strategy: where it is forced, the backward pass is Triton's."""
    call = draw(9, 24, 32, (3, 5), torch.bfloat16, layers=2)
    p = call.exact()[1].float()
    for a, b in zip(call.backward(p, "stream"), call.backward(p, "single")):
        assert torch.equal(a, b)
