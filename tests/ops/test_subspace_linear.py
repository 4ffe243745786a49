import itertools
import os
import subprocess
import sys

import pytest
import torch
from tolerances import GRADIENT, RELATIVE, factor_terms, relative_error

from masm_ext import reference
from masm_ext.ops import subspace_linear

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# leading shape of x, N, D, ranks of the subspaces (K = 1 .. 5, uneven, R not a multiple of 16)
CASES = [
    ((7,), 5, 3, (1,)),
    ((), 9, 11, (2, 3)),
    ((2, 257), 64, 48, (4, 4, 4)),
    ((3, 5, 7), 33, 65, (1, 7, 2, 3)),
    ((1100,), 129, 127, (5, 1, 9, 2, 6)),
    ((1,), 16, 16, (16,)),
    ((0,), 8, 6, (2, 1)),
    ((4, 0, 3), 8, 6, (3,)),
]


def make(shape, N, D, ranks, dtype, factor_dtype=None, bias=True):
    R = sum(ranks)
    offsets = [0, *itertools.accumulate(ranks)]
    f = factor_dtype or dtype
    args = {
        "x": torch.randn(*shape, D, dtype=torch.float64).to(dtype),
        "weight": (torch.randn(N, D, dtype=torch.float64) / D**0.5).to(dtype),
        "u": torch.randn(R, N, dtype=torch.float64).to(f),
        "s": torch.rand(R, dtype=torch.float64).to(f),
        "v": (torch.randn(R, D, dtype=torch.float64) / D**0.5).to(f),
        "bias": torch.randn(N, dtype=torch.float64).to(dtype) if bias else None,
    }
    return args, offsets


def double(args):
    return {k: None if t is None else t.detach().double().requires_grad_() for k, t in args.items()}


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"),
    [*zip(DTYPES, DTYPES), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
    ids=str,
)
def test_forward_and_gradients_match_float64_autograd(case, dtype, factor_dtype):
    args, offsets = make(*case, dtype, factor_dtype)
    exact = double(args)
    ref, _ = reference.subspace_linear(**exact)
    for name in args:
        if name != "weight":
            args[name].requires_grad_()
    y = subspace_linear(**args, offsets=offsets)
    assert y.dtype == dtype and y.shape == ref.shape
    assert relative_error(y, ref) <= RELATIVE[dtype]
    dy = torch.randn(ref.shape, dtype=torch.float64).to(dtype)
    y.backward(dy)
    ref.backward(dy.double())
    terms = factor_terms(*(exact[name] for name in "xusv"), dy)
    for name in ("x", "u", "v", "bias"):
        got = args[name].grad
        assert got.dtype == args[name].dtype
        assert relative_error(got, exact[name].grad, terms.get(name)) <= GRADIENT[dtype], name
    assert (args["s"].grad.double() - exact["s"].grad).norm() <= GRADIENT[dtype] * terms["s"].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_blocks_have_zero_gradients_and_dx_is_exact(dtype):
    args, offsets = make((1300,), 40, 24, (3, 2, 4), dtype)  # more than one task of the CPU
    exact = double(args)
    dy = torch.randn(1300, 40).to(dtype)
    reference.subspace_linear(**exact)[0].backward(dy.double())
    for name in ("x", "u", "s", "v"):
        args[name].requires_grad_()
    mask = torch.tensor([True, False, True])
    subspace_linear(**args, offsets=offsets, mask=mask).backward(dy)
    assert relative_error(args["x"].grad, exact["x"].grad) <= GRADIENT[dtype]
    masked, live = slice(3, 5), torch.tensor([0, 1, 2, 5, 6, 7, 8])
    for name in ("u", "s", "v"):
        assert args[name].grad[masked].abs().max() == 0
        assert relative_error(args[name].grad[live], exact[name].grad[live]) <= GRADIENT[dtype]


@pytest.mark.parametrize(
    ("live", "kept"), [((True, False), {"x", "p"}), ((False, False), set())], ids=["live", "masked"]
)
def test_x_and_p_are_kept_for_backward_only_while_a_subspace_is_live(live, kept):
    args, offsets = make((30,), 20, 12, (3, 4), torch.float32)
    for name in ("x", "u", "s", "v"):
        args[name].requires_grad_()
    saved = set()
    names = {(30, 12): "x", (30, 7): "p"}

    def pack(t):
        saved.add(names.get(tuple(t.shape)))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = subspace_linear(**args, offsets=offsets, mask=torch.tensor(live))
    assert saved - {None} == kept
    y.sum().backward()
    assert args["x"].grad.abs().sum() > 0 and (args["v"].grad.abs().sum() > 0) == any(live)


def test_backward_op_matches_reference_for_every_combination_of_needs():
    args, offsets = make((37,), 20, 12, (3, 4), torch.float64)
    bias = args.pop("bias")
    _, p = torch.ops.masm.subspace_linear(*args.values(), bias, None, offsets)
    dy = torch.randn(37, 20, dtype=torch.float64)
    for mask in (None, torch.tensor([True, False]), torch.tensor([False, False])):
        for needs in itertools.product([False, True], repeat=5):
            call = (dy, *args.values(), p, mask, offsets, *needs)
            got = torch.ops.masm.subspace_linear_backward(*call)
            want = reference.subspace_linear_backward(*call)
            for name, g, w, needed in zip(("dx", "du", "ds", "dv", "db"), got, want, needs):
                assert (g.numel() > 0) == needed, name
                assert relative_error(g, w) <= 1e-12, (name, needs, mask)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous_inputs(layout, dtype):
    args, offsets = make((10, 6), 14, 8, (2, 3), dtype)
    plain = {k: t.clone().requires_grad_() for k, t in args.items() if k != "weight"}
    odd = {}
    for name, t in args.items():
        if layout == "transposed" and t.dim() >= 2:
            t = t.mT.contiguous().mT
        elif layout == "strided":
            t = torch.stack([t, torch.full_like(t, float("nan"))], dim=-1)[..., 0]
        elif layout == "expanded" and name == "x":
            t = t[:1].expand(10, 6, 8)
            plain["x"] = t.contiguous().clone().requires_grad_()
        odd[name] = t
    weight = odd.pop("weight")
    odd = {k: t.detach().requires_grad_() for k, t in odd.items()}
    y = subspace_linear(weight=weight, **odd, offsets=offsets)
    want = subspace_linear(weight=args["weight"], **plain, offsets=offsets)
    assert relative_error(y, want) <= (1e-6 if dtype == torch.float32 else RELATIVE[dtype])
    dy = torch.randn(14, 6, 10).to(dtype).permute(2, 1, 0)
    y.backward(dy)
    want.backward(dy.contiguous())
    for name in odd:
        assert relative_error(odd[name].grad, plain[name].grad) <= GRADIENT[dtype], name


def test_every_output_element_is_written():
    # memory that torch.empty may hand out again is filled with NaN first
    args, offsets = make((515,), 96, 80, (3, 4), torch.float32)
    call = (*list(args.values())[:5], args["bias"], None, offsets)
    for _ in range(3):
        poison = [torch.full((515, n), float("nan")) for n in (96, 80, 7)] + [
            torch.full((7, n), float("nan")) for n in (96, 80)
        ]
        del poison
        y, p = torch.ops.masm.subspace_linear(*call)
        assert y.isfinite().all() and p.isfinite().all()
        back = torch.ops.masm.subspace_linear_backward(y, *list(args.values())[:5], p, None, offsets, *[True] * 5)
        assert all(g.isfinite().all() for g in back)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_over_rows_are_the_same_bit_for_bit_for_any_number_of_threads(dtype):
    args, offsets = make((1500,), 70, 50, (3, 4), dtype, bias=False)
    call = [args[k] for k in ("x", "weight", "u", "s", "v")]
    dy, p = torch.randn(1500, 70).to(dtype), torch.ops.masm.subspace_linear(*call, None, None, offsets)[1]
    mask = torch.tensor([True, False])
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 1, 2):
            torch.set_num_threads(threads)
            back = torch.ops.masm.subspace_linear_backward(dy, *call, p, mask, offsets, False, True, True, True, True)
            results.append(back[1:])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_results_do_not_depend_on_the_number_of_threads():
    args, offsets = make((1500,), 70, 50, (3, 4), torch.float64)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            leaves = {k: t.clone().requires_grad_(k != "weight") for k, t in args.items()}
            subspace_linear(**leaves, offsets=offsets).square().sum().backward()
            results.append([leaves[k].grad for k in ("u", "s", "v", "bias")])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results):
        assert relative_error(a, b) <= 1e-14


ISAS = ["baseline", "x86_64_v3", "x86_64_v4", "avx512_bf16"]


@pytest.mark.parametrize("isa", ISAS)
def test_every_instruction_set_of_this_cpu(isa, seed, tmp_path):
    """The same tests on the kernels of an older CPU. A CPU that lacks the instructions refuses by name."""
    tests = ["float64_autograd", "masked_blocks", "combination_of_needs", "element_is_written", "fidelity", "gradcheck"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", " or ".join(tests), "--seed", str(seed)],
        cwd=tmp_path,  # not the repository, whose masm_ext/ would be imported instead of the one under test
        env={**os.environ, "MASM_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    if "but this CPU lacks it" in run.stdout or f"MASM_CPU_ISA={isa} is unknown" in run.stdout:
        pytest.skip(f"this CPU lacks {isa}")
    assert run.returncode == 0, run.stdout[-3000:]


def test_an_unknown_instruction_set_is_refused(tmp_path):
    code = "import torch, masm_ext.ops as o; x = torch.ones(1, 1); o.subspace_linear(x, x, x, x[0], x)"
    env = {**os.environ, "MASM_CPU_ISA": "mmx"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert run.returncode != 0 and "MASM_CPU_ISA=mmx is unknown; expected baseline" in run.stderr


def test_gradcheck():
    args, offsets = make((5,), 6, 4, (2, 1), torch.float64)
    leaves = [args[k].requires_grad_() for k in ("x", "u", "s", "v", "bias")]
    torch.autograd.gradcheck(
        lambda x, u, s, v, b: subspace_linear(x, args["weight"], u, s, v, b, offsets=offsets), leaves
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(6,), (0,), (2, 3)], ids=str)
def test_opcheck(dtype, shape):
    args, offsets = make(shape, 8, 5, (2, 3), dtype)
    leaves = [args[k].requires_grad_(k != "weight") for k in ("x", "weight", "u", "s", "v", "bias")]
    mask = torch.tensor([True, False])
    torch.library.opcheck(torch.ops.masm.subspace_linear.default, (*leaves, mask, offsets))
    plain = [t.detach() for t in leaves[:5]]
    y, p = torch.ops.masm.subspace_linear(*plain, None, None, offsets)
    torch.library.opcheck(
        torch.ops.masm.subspace_linear_backward.default, (y, *plain, p, mask, offsets, True, True, False, True, True)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_casts_x_and_keeps_float32_factors(dtype):
    args, offsets = make((20,), 12, 10, (2, 2), torch.float32)
    leaves = {k: t.requires_grad_(k != "weight") for k, t in args.items()}
    exact = double(args)
    ref = reference.subspace_linear(**exact)[0]
    with torch.autocast("cpu", dtype):
        y = subspace_linear(**leaves, offsets=offsets)
    assert y.dtype == dtype
    assert relative_error(y, ref) <= 2 * RELATIVE[dtype]  # x and weight are rounded first
    dy = torch.randn(20, 12).to(dtype)
    y.backward(dy)
    ref.backward(dy.double())
    for name in ("x", "u", "s", "v", "bias"):
        assert leaves[name].grad.dtype == torch.float32
        assert relative_error(leaves[name].grad, exact[name].grad) <= 2 * GRADIENT[dtype], name


def test_autocast_does_not_reach_into_the_op():
    args, offsets = make((20,), 12, 10, (2, 2), torch.float32)
    call = (*list(args.values())[:5], args["bias"], None, offsets)
    want = torch.ops.masm.subspace_linear(*call)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.ops.masm.subspace_linear(*call)[0]
    assert torch.equal(got, want)


def test_no_outputs_and_no_inputs():
    for N, D in ((0, 5), (5, 0)):
        args, offsets = make((4,), N, D, (2,), torch.float32)
        args = {k: t.requires_grad_(k != "weight") for k, t in args.items()}
        y = subspace_linear(**args, offsets=offsets)
        y.sum().backward()
        assert y.shape == (4, N) and args["x"].grad.shape == (4, D) and args["s"].grad.abs().sum() == 0


def test_double_backward_is_refused_by_name():
    args, offsets = make((3,), 6, 4, (2, 1), torch.float32)
    x = args.pop("x").requires_grad_()
    args["u"].requires_grad_()  # dX depends on u
    (grad,) = torch.autograd.grad(subspace_linear(x, **args, offsets=offsets).sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_subspace_fidelity(alpha):
    """Cosine of the computed change of y against float64, s perturbed by 1% (docs/method.md, Numerics)."""
    N, D, R, M = 256, 256, 16, 300
    q, _ = torch.linalg.qr(torch.randn(N, N, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64))
    sigma = torch.arange(1, N + 1, dtype=torch.float64) ** -alpha
    weight = (q[:, :-R] * sigma[:-R]) @ v[:-R]
    factors = {"u": q[:, -R:].T.contiguous(), "v": v[-R:].contiguous()}
    s = sigma[-R:]
    moved = s * (1 + 0.01 * (torch.rand(R, dtype=torch.float64) < 0.5).double().mul(2).sub(1))
    for dtype, low_rank_only, least in ((torch.float32, False, 0.9999), (torch.bfloat16, True, 0.95)):
        # a bfloat16 y cannot show a change that small beside a dense product: the low-rank path alone is compared
        x = torch.randn(M, D, dtype=torch.float64).to(dtype)
        w = (weight * (not low_rank_only)).to(dtype)
        wide = {k: t.float() for k, t in factors.items()}
        before, after = (subspace_linear(x, w, s=t.float(), **wide).double() for t in (s, moved))
        exact = ((x.double() @ factors["v"].T) * (moved - s)) @ factors["u"]
        assert torch.cosine_similarity((after - before).flatten(), exact.flatten(), 0) >= least, dtype


@pytest.mark.parametrize("terms, low, high", [(1, 0.935, 0.95), (2, 0.97, 0.98)])
def test_one_bfloat16_for_the_coefficients_is_not_enough(terms, low, high):
    """Why P * s is kept as the sum of two bfloat16 numbers: the fidelity with one and with two of them."""

    def rounded(t):
        return t.to(torch.bfloat16).float()

    N, R, M = 256, 16, 300
    (q, _), (w, _) = (torch.linalg.qr(torch.randn(N, N, dtype=torch.float64)) for _ in range(2))
    u, v = q[:, -R:].T.contiguous(), w[-R:].contiguous()
    s = torch.arange(1, N + 1, dtype=torch.float64)[-R:] ** -0.5
    moved = s * (1 + 0.01 * (torch.rand(R, dtype=torch.float64) < 0.5).double().mul(2).sub(1))
    x = torch.randn(M, N, dtype=torch.float64).to(torch.bfloat16)

    def product(s):
        exact = (x.float() @ rounded(v.float()).T) * s.float()
        kept = rounded(exact)
        if terms == 2:
            kept = kept + rounded(exact - kept)
        return rounded(kept @ rounded(u.float())).double()

    exact = ((x.double() @ v.T) * (moved - s)) @ u
    change = product(moved) - product(s)
    assert low < torch.cosine_similarity(change.flatten(), exact.flatten(), 0) < high


@pytest.mark.parametrize("offsets", [[0, 2], [1, 3], [0, 2, 1, 3], [0]])
def test_bad_offsets(offsets):
    args, _ = make((3,), 6, 4, (2, 1), torch.float32)
    with pytest.raises(RuntimeError, match="offsets"):
        subspace_linear(**args, offsets=offsets)


def test_weight_has_no_gradient():
    args, offsets = make((3,), 6, 4, (2, 1), torch.float32)
    args["weight"].requires_grad_()
    with pytest.raises(RuntimeError, match="frozen principal subspace"):
        subspace_linear(**args, offsets=offsets).sum().backward()
