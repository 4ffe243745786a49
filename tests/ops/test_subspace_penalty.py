import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from tolerances import GRADIENT, relative_error

from masm_ext import reference
from masm_ext.ops import subspace_penalty

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
#: per layer N, D, ranks of its subspaces: one layer, mixed shapes, a subspace and a layer without directions, R above
#: and off the padding of 8, several panels of the weight, no outputs, no inputs
MODELS = [
    [(12, 20, (2, 3, 1))],
    [(12, 20, (2, 3, 1)), (12, 20, (2, 3, 1)), (16, 9, (2, 2)), (7, 33, (5,))],
    [(40, 24, (4, 0, 4)), (24, 24, (0, 0)), (9, 11, (9,))],
    [(1, 1, (1,)), (70, 50, (10, 13, 2)), (130, 33, (16, 16, 1))],
    [(700, 310, (4, 4)), (50, 2500, (3, 3))],
    [(0, 4, (2,)), (4, 0, (2,)), (5, 6, (1, 1))],
]
NAMES = ("weights", "u", "s", "v", "s0", "weight_norm2")


def make(model, dtype=torch.float32, factor_dtype=None, moved=0.1):
    """Lists over layers whose factors are near orthonormal and near s0; drawn in float64, rounded to the dtypes."""
    factor_dtype = dtype if factor_dtype is None else factor_dtype
    lists = {name: [] for name in NAMES}
    offsets = []
    for N, D, ranks in model:
        R = sum(ranks)
        weight = (torch.randn(N, D, dtype=torch.float64) / max(D, 1) ** 0.5).to(dtype)
        u, v = (torch.linalg.qr(torch.randn(max(n, R), R, dtype=torch.float64))[0].T[:, :n] for n in (N, D))
        s0 = torch.rand(R, dtype=torch.float64) + 0.1
        factors = {"u": u, "s": s0, "v": v}
        for name, t in factors.items():
            lists[name].append((t + moved * torch.randn_like(t) / max(t.shape[-1], 1) ** 0.5).to(factor_dtype))
        lists["weights"].append(weight)
        lists["s0"].append(s0.to(factor_dtype))
        lists["weight_norm2"].append(weight.double().square().sum().to(factor_dtype))
        offsets.append([sum(ranks[:k]) for k in range(len(ranks) + 1)])
    return lists, offsets


def raw(lists, offsets, need_gradients=True):
    """The arguments of the op."""
    flat = [o for bounds in offsets for o in bounds]
    return (*(lists[n] for n in NAMES), flat, [len(b) - 1 for b in offsets], need_gradients)


def double(lists):
    return {name: [t.double() for t in ts] for name, ts in lists.items()}


def formula(weight, u, s, v, s0, norm2, offsets):
    """docs/method.md, one layer, term by term; ||What||^2 - ||W||^2 with the current weight formed."""
    parts = list(pairwise(offsets))
    orthogonality = 0
    for j, (a, b) in enumerate(parts):
        for c, d in parts[j + 1 :]:
            orthogonality = orthogonality + (u[a:b] @ u[c:d].T).square().sum() + (v[a:b] @ v[c:d].T).square().sum()
        eye = torch.eye(b - a, dtype=u.dtype)
        orthogonality = orthogonality + (u[a:b] @ u[a:b].T - eye).square().sum()
        orthogonality = orthogonality + (v[a:b] @ v[a:b].T - eye).square().sum()
        interference = (weight.T @ u[a:b].T).square().sum() + (weight @ v[a:b].T).square().sum()
        orthogonality = orthogonality + interference / norm2.clamp_min(torch.finfo(u.dtype).tiny)
    base = norm2 + s0.square().sum()
    now = (weight + (u.T * s) @ v).square().sum() - weight.square().sum() + norm2
    spectral = ((now - base) / base.clamp_min(torch.finfo(u.dtype).tiny)).square()
    for a, b in parts:
        denominator = ((b - a) * base / max(1, min(weight.shape))).clamp_min(torch.finfo(u.dtype).tiny)
        spectral = spectral + (s[a:b] - s0[a:b]).square().sum() / denominator
    return orthogonality, spectral


def flat_gradients(total, lists):
    leaves = [t for name in ("u", "v", "s") for t in lists[name]]
    grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return torch.cat([g.flatten() for g in grads])


@pytest.mark.parametrize("index", range(len(MODELS)))
def test_the_reference_is_the_formula_and_its_gradients_are_autograds(index):
    lists, offsets = make(MODELS[index], torch.float64)
    for name in ("u", "s", "v"):
        lists[name] = [t.requires_grad_() for t in lists[name]]
    want = [formula(*(lists[n][i] for n in NAMES), bounds) for i, bounds in enumerate(offsets)]
    want = [sum(x) for x in zip(*want)]
    with torch.no_grad():
        *sums, gradients = reference.subspace_penalty(*raw(lists, offsets))
    for got, total, row in zip(sums, want, gradients):
        assert relative_error(got, total) <= 1e-12
        assert relative_error(row, flat_gradients(total, lists)) <= 1e-11


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True], ids=["same", "float32"])
@pytest.mark.parametrize("index", range(len(MODELS)))
def test_matches_float64(index, dtype, wide):
    factor_dtype = torch.float32 if wide and dtype != torch.float64 else dtype
    lists, offsets = make(MODELS[index], dtype, factor_dtype)
    *sums, gradients = torch.ops.masm.subspace_penalty(*raw(lists, offsets))
    *want, want_gradients = reference.subspace_penalty(*raw(double(lists), offsets))
    # half-precision weights and factors are widened exactly, so float32's tolerance holds for every dtype
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for got, exact, row, want_row in zip(sums, want, gradients, want_gradients):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and got.shape == ()
        assert relative_error(got, exact) <= tolerance
        assert relative_error(row, want_row) <= tolerance
    *again, none = torch.ops.masm.subspace_penalty(*raw(lists, offsets, need_gradients=False))
    assert none.shape == (2, 0) and all(torch.equal(a, b) for a, b in zip(again, sums))


@pytest.mark.parametrize("moved", [0, 1e-7, 1e-5, 1e-3, 1e-1])
def test_float32_near_init(moved):
    """Near init the losses are differences that all but vanish. Beside 1e-5 of the value, the error is bounded by the
    size of what is subtracted: 1 for each of the 2R diagonal elements of u u^T and v v^T (their gradients: 4 for each
    row of length 1), and ||s0|| ||W|| / ||W||^2 for the change of the norm."""
    lists, offsets = make([(96, 200, (4, 4, 4, 4)), (200, 130, (4, 4))], torch.float64, moved=moved)
    for i, (w, u, v) in enumerate(zip(lists["weights"], lists["u"], lists["v"])):  # as after a decomposition
        uq, vq = (torch.linalg.qr(t.T)[0].T for t in (u, v))
        w -= uq.T @ (uq @ w)
        w -= (w @ vq.T) @ vq
        lists["weight_norm2"][i] = w.square().sum()
    single = {name: [t.float() for t in ts] for name, ts in lists.items()}
    *sums, gradients = torch.ops.masm.subspace_penalty(*raw(single, offsets))
    *want, want_gradients = reference.subspace_penalty(*raw(double(single), offsets))
    rows = sum(len(t) for t in lists["s"])
    shares = [s.square().sum() / (s.square().sum() + n) for s, n in zip(lists["s0"], lists["weight_norm2"])]
    share = float(sum(shares))  # (||s0|| / ||W||)^2
    for got, exact, scale in zip(sums, want, (2 * rows, share)):
        assert abs(got.double() - exact) <= 1e-5 * exact + 1e-12 * scale
    for got, exact, scale in zip(gradients, want_gradients, (4 * (2 * rows) ** 0.5, share)):
        assert (got.double() - exact).norm() <= 1e-5 * exact.norm() + 1e-7 * scale


@pytest.mark.parametrize("isa", ["baseline", "x86_64_v3", "x86_64_v4"])
def test_every_instruction_set_of_this_cpu(isa, seed, tmp_path):
    """The same tests on the loops of an older CPU. A CPU that lacks the instructions refuses by name."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", __file__, "-k", "float64 or near_init or special", "--seed", str(seed)],
        cwd=tmp_path,  # not the repository, whose masm_ext/ would be imported instead of the one under test
        env={**os.environ, "MASM_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    if f"MASM_CPU_ISA={isa}" in run.stdout and run.returncode:
        pytest.skip(f"this CPU or this build has no {isa}")
    assert run.returncode == 0, run.stdout[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_non_contiguous(dtype):
    lists, offsets = make(MODELS[1], dtype)
    odd = {name: [t.mT.contiguous().mT if t.dim() == 2 else t for t in ts] for name, ts in lists.items()}
    odd["s"] = [torch.stack([s, torch.full_like(s, float("nan"))], 1)[:, 0] for s in lists["s"]]
    odd["weight_norm2"] = [t.reshape(1, 1) for t in lists["weight_norm2"]]
    got, want = (torch.ops.masm.subspace_penalty(*raw(x, offsets)) for x in (odd, lists))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_repeatable_and_independent_of_threads():
    for model in (MODELS[4], [(300, 400, (4, 4))], MODELS[1] * 9):
        lists, offsets = make(model)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2, 2, 1):
                torch.set_num_threads(threads)
                results.append(torch.ops.masm.subspace_penalty(*raw(lists, offsets)))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_every_element_is_written():
    lists, offsets = make(MODELS[3])
    elements = sum(t.numel() for name in ("u", "s", "v") for t in lists[name])
    for _ in range(3):  # memory that torch.empty may hand out again is filled with NaN first
        poison = [torch.full((2, elements), float("nan")), torch.full((), float("nan"))]
        del poison
        assert all(t.isfinite().all() for t in torch.ops.masm.subspace_penalty(*raw(lists, offsets)))


def test_special_values_of_half_precision_weights():
    """Subnormal, largest and infinite elements are widened as torch widens them."""
    for dtype in (torch.float16, torch.bfloat16):
        lists, offsets = make([(8, 8, (2,))], dtype, torch.float32)
        info = torch.finfo(dtype)
        lists["weights"][0][0, :4] = torch.tensor([info.smallest_normal / 4, -info.smallest_normal / 2, 0.0, -1.5])
        wide = {**lists, "weights": [lists["weights"][0].float()]}
        got, want = (torch.ops.masm.subspace_penalty(*raw(x, offsets)) for x in (lists, wide))
        assert all(torch.equal(a, b) for a, b in zip(got, want))
        for value in (float("inf"), -float("inf"), float("nan")):
            lists["weights"][0][3, 3] = value
            assert not torch.ops.masm.subspace_penalty(*raw(lists, offsets))[0].isfinite()


def leaves_of(lists):
    return [lists[name][i].requires_grad_() for name in ("u", "s", "v") for i in range(len(lists["u"]))]


def test_gradcheck():
    lists, offsets = make([(6, 5, (2, 1)), (4, 7, (2,))], torch.float64)
    leaves = leaves_of(lists)

    def call(*tensors):
        parts = dict(zip("usv", (tensors[0:2], tensors[2:4], tensors[4:6])))
        return subspace_penalty(*({**lists, **parts}[n] for n in NAMES), offsets)

    torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_scales_and_adds(dtype):
    lists, offsets = make(MODELS[1], dtype)
    leaves = leaves_of(lists)
    orthogonality, spectral = subspace_penalty(*(lists[n] for n in NAMES), offsets)
    gradients = torch.ops.masm.subspace_penalty(*raw(lists, offsets))[2]
    for weights in ((3.0, -0.5), (2.0, 0.0), (0.0, 1.0)):
        used = [w * x for w, x in zip(weights, (orthogonality, spectral)) if w]  # one of them may have no part at all
        grads = torch.autograd.grad(sum(used), leaves, retain_graph=True)
        want = weights[0] * gradients[0] + weights[1] * gradients[1]
        L = len(lists["u"])
        flat = torch.cat([g.flatten() for g in (*grads[:L], *grads[2 * L :], *grads[L : 2 * L])])
        assert all(g.dtype == dtype and g.shape == p.shape for g, p in zip(grads, leaves))
        assert relative_error(flat, want) <= {torch.float32: 1e-6, torch.float64: 1e-15}.get(dtype, GRADIENT[dtype])


def test_frozen_factors_and_no_grad():
    lists, offsets = make(MODELS[1])
    for s in lists["s"]:
        s.requires_grad_()
    call = [lists[n] for n in NAMES]
    total = sum(subspace_penalty(*call, offsets))
    total.backward()
    assert all(s.grad is not None for s in lists["s"]) and all(u.grad is None for u in lists["u"])
    with torch.no_grad():
        assert not any(x.requires_grad for x in subspace_penalty(*call, offsets))
    with pytest.raises(RuntimeError, match="need_gradients=False"):
        torch.ops.masm.subspace_penalty(*raw(lists, offsets, need_gradients=False))[1].backward()


def test_weight_has_no_gradient():
    lists, offsets = make(MODELS[0])
    leaves_of(lists)
    lists["weights"][0].requires_grad_()
    with pytest.raises(RuntimeError, match="frozen principal subspace"):
        sum(subspace_penalty(*(lists[n] for n in NAMES), offsets)).backward()


def test_autocast_does_not_reach_into_the_op():
    lists, offsets = make(MODELS[1])
    call = [lists[n] for n in NAMES]
    want = subspace_penalty(*call, offsets)
    with torch.autocast("cpu", torch.bfloat16):
        got = subspace_penalty(*call, offsets)
    assert all(torch.equal(a, b) and a.dtype == torch.float32 for a, b in zip(got, want))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("index", [1, 2])
def test_opcheck(dtype, index):
    lists, offsets = make(MODELS[index], dtype)
    leaves_of(lists)
    torch.library.opcheck(torch.ops.masm.subspace_penalty.default, raw(lists, offsets))


def test_compiles_as_one_graph():
    lists, offsets = make(MODELS[1])
    leaves = leaves_of(lists)

    def loss():
        return sum(subspace_penalty(*(lists[n] for n in NAMES), offsets))

    want = torch.autograd.grad(loss(), leaves)
    got = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(), leaves)
    assert all(relative_error(a, b) <= 1e-6 for a, b in zip(got, want))


def test_no_layer():
    for call in (lambda: subspace_penalty(*[[]] * 7), lambda: reference.subspace_penalty(*[[]] * 8)):
        with pytest.raises(RuntimeError, match="at least one layer"):
            call()


@pytest.mark.parametrize("op", ["kernel", "formula"])
@pytest.mark.parametrize(("flat", "subspaces"), [([0, 2, 3, 0, 3], [2, 2]), ([0, 2, 3, 0, 3, 3, 3], [2, 2])])
def test_a_wrong_number_of_offsets(op, flat, subspaces):
    lists, _ = make([(6, 5, (2, 1)), (4, 5, (1, 2))])
    function = torch.ops.masm.subspace_penalty if op == "kernel" else reference.subspace_penalty
    with pytest.raises(RuntimeError, match="offsets"):
        function(*(lists[n] for n in NAMES), flat, subspaces, True)
