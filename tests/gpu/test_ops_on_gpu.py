"""Every op and strategy on a GPU against float64: numbers, determinism, no waiting for the GPU, streams, graphs."""

import itertools
from contextlib import contextmanager

import pytest
import torch
from tolerances import GRADIENT, RELATIVE, relative_error

import masm_ext
from masm_ext import _library, reference
from masm_ext.ops import fold, strategies, subspace_linear, subspace_linear_group, subspace_penalty

pytestmark = pytest.mark.gpu

STRATEGIES = ("", "kext", "single", "stream", "addmm", "folded")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: y and sums over rows with tf32 allowed: 11 bits of each operand.
TF32 = (1e-3, 2e-3)


def draw(M, N, D, ranks, dtype, device, layers=None):
    """x, dy, (weight, u, s, v, bias) of a layer, or lists of them for a group, and offsets."""
    R, wide = sum(ranks), torch.float32 if dtype != torch.float64 else dtype

    def new(*shape, scale=1.0, to=wide):
        made = [(scale * torch.randn(*shape, device=device)).to(to) for _ in range(layers or 1)]
        return made if layers else made[0]

    x = torch.randn(M, D, device=device).to(dtype)
    parts = (
        new(N, D, scale=D**-0.5, to=dtype),
        new(R, N),
        new(R),
        new(R, D, scale=D**-0.5),
        new(N, to=dtype),
    )
    return x, new(M, N, to=dtype), parts, [0, *itertools.accumulate(ranks)]


def served(strategy, ranks, layers=1, dtype=torch.bfloat16):
    if strategy == "stream" and dtype == torch.float32:
        return False
    return not (strategy in ("single", "stream") and sum(ranks) > 64) and layers * sum(ranks) <= strategies.MAX_RANK


@pytest.fixture
def fitting(strategy, shapes, device):
    """`shapes`, with as many rows as the strategy serves."""
    if strategy != "stream":
        return shapes
    if _library.CUDA_LIBRARY is None or device.type != "cuda":
        pytest.skip("stream is CUDA C++: it runs on a GPU only, where libmasm_cuda is loaded")
    return [(min(M, strategies.STREAM_ROWS), N, D, ranks) for M, N, D, ranks in shapes if D % 8 == 0]


def run(x, dy, parts, offsets, mask=None, strategy=""):
    """y, dx, du, ds, dv, dbias."""
    weight, *rest = parts
    leaves = [t.detach().clone().requires_grad_() for t in (x, *rest)]
    y = subspace_linear(leaves[0], weight, *leaves[1:], offsets=offsets, mask=mask, strategy=strategy)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves)]


def exact(x, dy, parts, offsets, mask=None):
    weight, u, s, v, bias = (t.double() for t in parts)
    y, p = reference.subspace_linear(x.double(), weight, u, s, v, bias)
    q = dy.double() @ u.mT
    grads = reference.subspace_linear_backward(dy.double(), x.double(), weight, u, s, v, p, mask, offsets)
    return [y, *grads], float((p * q).abs().sum(0).norm())


def check(got, want, terms, dtype, tf32=False):
    single, sums = TF32 if tf32 else (RELATIVE[dtype], GRADIENT[dtype])
    for name, a, b in zip(("y", "dx", "du", "ds", "dv", "dbias"), got, want):
        if name == "ds":  # may cancel: compared with its terms
            assert float((a.double() - b).norm()) <= sums * terms, name
        else:
            assert relative_error(a, b) <= (single if name in ("y", "dx") else sums), name


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(strategy, dtype, device, fitting):
    for M, N, D, ranks in fitting:
        if not served(strategy, ranks, dtype=dtype):
            continue
        call = draw(M, N, D, ranks, dtype, device)
        check(run(*call, strategy=strategy), *exact(*call), dtype)


@pytest.mark.parametrize("strategy", [s for s in STRATEGIES if s != "stream"])
def test_tf32(strategy, device, fitting):
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    M, N, D, ranks = fitting[0]
    call = draw(M, N, D, ranks, torch.float32, device)
    check(run(*call, strategy=strategy), *exact(*call), torch.float32, tf32=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_masks(strategy, device, fitting):
    M, N, D, ranks = fitting[0]
    for bits in ([False] * len(ranks), [True] * (len(ranks) - 1) + [False]):
        mask = torch.tensor(bits, device=device)
        call = draw(M, N, D, ranks, torch.bfloat16, device)
        got = run(*call, mask=mask, strategy=strategy)
        check(got, *exact(*call, mask=mask), torch.bfloat16)
        assert all(not got[i][-ranks[-1] :].any() for i in (2, 3, 4))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("layers", [2, 3])
def test_groups(layers, strategy, device, fitting):
    for M, N, D, ranks in fitting[:2]:
        if not served(strategy, ranks, layers):
            continue
        x, dy, lists, offsets = draw(M, N, D, ranks, torch.bfloat16, device, layers)
        weight, *rest = lists
        leaves = [[t.detach().clone().requires_grad_() for t in ts] for ts in rest]
        x = x.requires_grad_()
        ys = subspace_linear_group(x, weight, *leaves, offsets=offsets, strategy=strategy)
        torch.autograd.backward(ys, dy)
        dx = 0
        for j in range(layers):
            parts = [ts[j] for ts in lists]
            want, terms = exact(x.detach(), dy[j], parts, offsets)
            got = [ys[j].detach(), want[1], *(ts[j].grad for ts in leaves)]
            check(got, want, terms, torch.bfloat16)
            dx = dx + want[1]
        assert relative_error(x.grad, dx) <= GRADIENT[torch.bfloat16]


def test_float64_is_the_formula(device):
    call = draw(30, 20, 10, (3,), torch.float64, device)
    check(run(*call), *exact(*call), torch.float64)


def test_the_table_serves_what_it_names(device, gpu_only, shapes):
    """The default is bit for bit one of the strategies that can be forced."""
    for M, N, D, ranks in shapes:
        x, _, parts, offsets = draw(M, N, D, ranks, torch.bfloat16, device)
        with torch.no_grad():
            y = subspace_linear(x, *parts, offsets=offsets)
            stream = M <= strategies.STREAM_ROWS and D % 8 == 0 and _library.CUDA_LIBRARY is not None
            forced = [s for s in STRATEGIES[1:] if served(s, ranks) and (stream or s != strategies.STREAM)]
            assert any(torch.equal(y, subspace_linear(x, *parts, offsets=offsets, strategy=s)) for s in forced)


def test_fold(device, shapes):
    for dtype in DTYPES:
        for M, N, D, ranks in shapes:
            parts = draw(M, N, D, ranks, dtype, device)[2][:4]
            assert relative_error(fold(*parts), reference.fold(*(t.double() for t in parts))) <= RELATIVE[dtype]


def test_subspace_penalty(device, shapes):
    for dtype in (torch.float32, torch.bfloat16):
        layers = [draw(*shape, dtype, device)[2] for shape in shapes[:3] + shapes[:1]]
        offsets = [[0, *itertools.accumulate(shape[3])] for shape in shapes[:3] + shapes[:1]]
        lists = [list(t) for t in zip(*layers)][:4]
        s0 = [s + 0.1 for s in lists[2]]
        norm2 = [w.float().square().sum() for w in lists[0]]
        leaves = [[t.clone().requires_grad_() for t in ts] for ts in lists[1:]]
        sums = subspace_penalty(lists[0], *leaves, s0, norm2, offsets)
        (sums[0] + 3 * sums[1]).backward()
        wide = [[t.double() for t in ts] for ts in (*lists, s0, norm2)]
        flat, counts = list(itertools.chain(*offsets)), [len(o) - 1 for o in offsets]
        orthogonality, spectral, gradients = reference.subspace_penalty(*wide, flat, counts)
        assert relative_error(sums[0], orthogonality) <= 1e-5 and relative_error(sums[1], spectral) <= 1e-4
        u, s, v = leaves
        got = torch.cat([t.grad.flatten().double() for t in (*u, *v, *s)])
        assert relative_error(got, gradients[0] + 3 * gradients[1]) <= 1e-4


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_results_are_the_same_bits_every_time(strategy, device, fitting):
    M, N, D, ranks = fitting[0]
    call = draw(M, N, D, ranks, torch.bfloat16, device)
    mask = torch.tensor([True] * (len(ranks) - 1) + [False], device=device)
    first = run(*call, mask=mask, strategy=strategy)
    for _ in range(1 if device.type == "cpu" else 20):
        assert all(torch.equal(a, b) for a, b in zip(run(*call, mask=mask, strategy=strategy), first))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_host_waits_for_nothing(dtype, strategy, device, gpu_only, fitting):
    for M, N, D, ranks in (fitting[0], (64, 512, 2048, (16, 16))):  # float32 with R = 32 uses the formula
        if not served(strategy, ranks, dtype=dtype):
            continue
        call = draw(M, N, D, ranks, dtype, device)
        mask = torch.ones(len(ranks), dtype=torch.bool, device=device)
        run(*call, mask=mask, strategy=strategy)  # compiled; what a forward pass launches is tuned
        with no_waiting():
            run(*call, mask=mask, strategy=strategy)


def test_the_host_waits_for_no_loss(device, gpu_only, shapes):
    step = losses(device, shapes)
    step()
    with no_waiting():
        step()


@contextmanager
def no_waiting():
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(device, shapes):
    """A function that returns both losses and the gradients of their sum."""
    layers = [draw(*shape, torch.bfloat16, device)[2] for shape in shapes[:2]]
    weights, u, s, v = ([layer[i] for layer in layers] for i in range(4))
    leaves = [[t.requires_grad_() for t in ts] for ts in (u, s, v)]
    s0, norm2 = [t.detach() + 0.1 for t in s], [w.float().square().sum() for w in weights]
    offsets = [[0, *itertools.accumulate(shape[3])] for shape in shapes[:2]]

    def step():
        sums = subspace_penalty(weights, *leaves, s0, norm2, offsets)
        return [*sums, *torch.autograd.grad(sum(sums), [t for ts in leaves for t in ts])]

    return step


def captured(step):
    """A graph of `step`, after the warm-up that PyTorch requires, and its results."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def test_cuda_graph_of_the_losses(device, gpu_only, shapes):
    step = losses(device, shapes)
    want = step()
    graph, got = captured(step)
    graph.replay()
    torch.cuda.synchronize()
    for a, b in zip(got, want):
        assert relative_error(a, b) <= 1e-5


def test_cuda_graph_of_a_group(device, gpu_only, shapes):
    x, dy, lists, offsets = draw(*shapes[0], torch.bfloat16, device, layers=3)
    weight, *rest = lists
    leaves = [[t.requires_grad_() for t in ts] for ts in rest]
    mask = [torch.tensor([True, False, True, j > 0], device=device) for j in range(3)]

    def step():
        ys = subspace_linear_group(x, weight, *leaves, offsets=offsets, mask=mask)
        return [*ys, *torch.autograd.grad(ys, [t for ts in leaves for t in ts], dy)]

    want = step()
    graph, got = captured(step)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, want))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_stream(strategy, device, gpu_only, fitting):
    """Work is queued on the current stream: behind what makes its input there, before what reads its output there."""
    M, N, D, ranks = fitting[0]
    x, dy, parts, offsets = draw(M, N, D, ranks, torch.bfloat16, device)
    want = run(x, dy, parts, offsets, strategy=strategy)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # tens of milliseconds
        late.copy_(x)
        got = run(late, dy, parts, offsets, strategy=strategy)
        copies = [t.clone() for t in got]
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(copies, want))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_cuda_graph(dtype, strategy, device, gpu_only, fitting):
    """Captured once; other inputs and another mask, written in place, count at replay."""
    M, N, D, ranks = fitting[0]
    if not served(strategy, ranks, dtype=dtype):
        pytest.skip("stream serves half precision")
    x, dy, parts, offsets = draw(M, N, D, ranks, dtype, device)
    mask = torch.ones(len(ranks), dtype=torch.bool, device=device)
    weight, *rest = parts
    leaves = [t.requires_grad_() for t in (x, *rest)]

    def step():
        y = subspace_linear(leaves[0], weight, *leaves[1:], offsets=offsets, mask=mask, strategy=strategy)
        return y, torch.autograd.grad(y, leaves, dy)

    graph, (y, grads) = captured(step)
    for bits in ([True] * len(ranks), [False] * len(ranks), [True] * (len(ranks) - 1) + [False]):
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
            mask.copy_(torch.tensor(bits))
        graph.replay()
        torch.cuda.synchronize()
        got = [y.detach(), *grads]
        check(got, *exact(x.detach(), dy, [t.detach() for t in parts], offsets, mask), dtype)


def test_opcheck(device):
    x, _, parts, offsets = draw(20, 24, 32, (2, 3), torch.float32, device)
    mask = torch.tensor([True, False], device=device)
    weight, *rest = parts
    leaves = [t.requires_grad_() for t in (x, *rest)]
    op = torch.ops.masm.subspace_linear
    torch.library.opcheck(op.default, (leaves[0], weight, *leaves[1:], mask, offsets, True, ""))
    torch.library.opcheck(torch.ops.masm.fold.default, tuple(t.detach() for t in parts[:4]))


def test_build_info_names_triton(device):
    ops = masm_ext.build_info()["ops"]
    assert all("Triton" in ops[f"masm::{op}"]["cuda"] for op in ("subspace_linear", "subspace_penalty"))
