import pytest
import torch
from tolerances import relative_error

from masm_ext import MaskedAdamW, reference
from masm_ext.ops import masked_adamw_

#: rows (tensor, begin, end, block) over tensors of 24, 7 and 40,000 elements; block 3 owns two segments
SEGMENTS = torch.tensor([[0, 0, 8, 0], [0, 8, 24, 1], [1, 0, 7, 2], [2, 0, 20000, 3], [2, 20000, 40000, 3]])
HYPER = torch.tensor(
    [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.9, 0.99, 1e-6, 0.0], [1e-3, 0.8, 0.999, 1e-8, 0.01]], dtype=torch.float64
)


def make(dtype, requested=torch.float64):
    shapes = [(4, 6), (7,), (200, 200)]
    params = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    grads = [torch.randn(s, dtype=torch.float64).to(dtype) for s in shapes]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    m = [0.1 * torch.randn(s, dtype=wide) for s in shapes]
    v = [0.1 * torch.rand(s, dtype=wide) for s in shapes]
    penalties = [
        0.1 * torch.randn(shapes[0], dtype=wide),
        torch.empty(0, dtype=wide),
        torch.randn(shapes[2], dtype=wide),
    ]
    steps = torch.tensor([0, 3, 10, 100])
    return params, grads, m, v, penalties, steps


def copies(args):
    return [[t.clone() for t in a] if isinstance(a, list) else a.clone() for a in args]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [(1, 1, 1, 1), (1, 0, 0.25, 1), (0, 0, 0, 0), (0, 1, 1, 0)], ids=str)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_matches_reference_in_float64(dtype, mask, scale):
    args = make(dtype)
    before = copies(args)
    exact = [[t.double() for t in a] if isinstance(a, list) else a.clone() for a in copies(args)]
    if scale is not None:
        args[1][:] = [g * scale for g in args[1]]
        exact[1][:] = [g.double() for g in args[1]]
    mask = torch.tensor(mask, dtype=torch.float32)
    grad_scale = None if scale is None else torch.tensor([scale])
    stats, found = masked_adamw_(*args, mask, SEGMENTS, HYPER, grad_scale, None)
    want_stats, _ = reference.masked_adamw_(*exact, mask, SEGMENTS, HYPER, grad_scale, None)
    assert found.item() == 0
    tolerance = {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype]
    for group in (0, 2, 3):
        for got, want in zip(args[group], exact[group]):
            assert relative_error(got, want) <= tolerance
    assert torch.equal(args[5], before[5] + (mask != 0))
    assert relative_error(stats, want_stats) <= max(tolerance, 1e-6) and (stats[mask == 0] == 0).all()
    for t, begin, end, block in SEGMENTS.tolist():
        if mask[block] == 0:
            for group in (0, 2, 3):
                assert torch.equal(args[group][t].view(-1)[begin:end], before[group][t].view(-1)[begin:end])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_non_finite_gradient_writes_nothing(bad, dtype):
    args = make(dtype)
    args[1][2].view(-1)[39999] = bad
    before = copies(args)
    stats, found = masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER)
    assert found.item() == 1 and (stats == 0).all()
    for group in (0, 2, 3):
        assert all(torch.equal(a, b) for a, b in zip(args[group], before[group]))
    assert torch.equal(args[5], before[5])
    # in a masked block it is not read
    _, found = masked_adamw_(*args, torch.tensor([1.0, 1.0, 1.0, 0.0]), SEGMENTS, HYPER)
    assert found.item() == 0 and not torch.equal(args[0][0], before[0][0])


def test_a_gradient_whose_square_overflows_counts_as_not_finite():
    args = make(torch.float32)
    args[1][0][1, 1] = 1e30
    before = copies(args)
    for op in (masked_adamw_, reference.masked_adamw_):
        _, found = op(*args, torch.ones(4), SEGMENTS, HYPER)
        assert found.item() == 1 and torch.equal(args[3][0], before[3][0])
    scaled = [None if t is None else t for t in (torch.tensor([2.0**60]), None)]
    _, found = masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER, *scaled)
    assert found.item() == 0  # 1e30 is a small gradient under that scale


def test_version_counters_are_bumped():
    args = make(torch.float32)
    versions = [t._version for t in (*args[0], *args[2], *args[3])]
    masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER)
    assert all(t._version > v for t, v in zip((*args[0], *args[2], *args[3]), versions))


def test_found_inf_from_outside_skips():
    args = make(torch.float32)
    before = copies(args)
    _, found = masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER, None, torch.ones(1))
    assert found.item() == 1 and torch.equal(args[0][0], before[0][0])


def test_repeatable_and_independent_of_threads():
    runs = []
    start = make(torch.float32)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            args = copies(start)
            stats, _ = masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER)
            runs.append([*args[0], stats])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs))


def test_sums_of_tiny_gradients_do_not_underflow():
    args = make(torch.float32)
    args[1][:] = [1e-25 * g for g in args[1]]  # their squares are below the smallest float32
    args[2][:] = [0.5 * g for g in args[1]]
    exact = [[t.double() for t in a] if isinstance(a, list) else a.clone() for a in copies(args)]
    stats, _ = masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER)
    want, _ = reference.masked_adamw_(*exact, torch.ones(4), SEGMENTS, HYPER)
    assert (want[1:] > 0).all() and (want[0] == 0).all()  # block 0 has taken no step yet
    assert ((stats - want).abs() <= 1e-6 * want).all()


@pytest.mark.parametrize("order", [[4, 2, 0, 3, 1], [0, 1, 2, 3, 4]], ids=str)
def test_the_order_of_segments_does_not_matter_to_the_parameters(order):
    args, other = (lambda a: (a, copies(a)))(make(torch.float32))
    masked_adamw_(*args, torch.ones(4), SEGMENTS, HYPER)
    masked_adamw_(*other, torch.ones(4), SEGMENTS[order], HYPER)
    assert all(torch.equal(a, b) for group in (0, 2, 3) for a, b in zip(args[group], other[group]))


def test_the_optimizer_notices_replaced_states_and_moved_groups():
    """State kept for the next step is dropped if it no longer fits."""
    params = [torch.nn.Parameter(torch.randn(5)) for _ in range(3)]
    ours, twin = (MaskedAdamW(x, lr=0.1) for x in (params, [torch.nn.Parameter(p.detach().clone()) for p in params]))

    def step(zero_state=False):
        for o in (ours, twin):
            generator = torch.Generator().manual_seed(step.count)
            for p in o.param_groups[0]["params"]:
                p.grad = torch.randn(5, generator=generator)
            if zero_state:
                for state in o.state.values():
                    state["exp_avg"].zero_()
        step.count += 1
        if zero_state:  # the same, through a new dict
            ours.state[params[1]] = {k: v.clone() for k, v in ours.state[params[1]].items()}
        ours.step()
        twin._last_plan = None
        twin.step()
        assert all(torch.equal(a, b) for a, b in zip(params, twin.param_groups[0]["params"]))

    step.count = 0
    step()
    old = ours.state[params[1]]["exp_avg"].clone()
    step(zero_state=True)
    assert not torch.equal(ours.state[params[1]]["exp_avg"], old)
    ours.load_state_dict(ours.state_dict())
    step()
    params[0].grad = params[2].grad = None
    before = params[0].detach().clone()
    params[1].grad = torch.ones(5)
    ours.step()
    assert torch.equal(params[0], before) and ours.state_dict()["masked"]["steps"].tolist() == [3, 4, 3]
    ours.state.clear()
    ours.step()
    assert list(ours.state) == [params[1]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_opcheck(dtype):
    args = make(dtype)
    torch.library.opcheck(
        torch.ops.masm.masked_adamw_.default, (*args, torch.tensor([1, 0, 0.5, 1.0]), SEGMENTS, HYPER, None, None)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(segments=torch.tensor([[0, 0, 25, 0]])), "outside its tensor"),
        (lambda a: a.update(segments=torch.tensor([[0, 0, 5, 4]])), "outside its tensor or the blocks"),
        (lambda a: a.update(mask=torch.tensor([1, 1, 1, float("nan")])), r"expected a value in \[0, 1\]"),
        (lambda a: a.update(mask=torch.tensor([1, 1, 1, 1.5])), r"mask\[3\] is 1.5"),
        (lambda a: a.update(segments=torch.tensor([[2, 0, 9, 0], [0, 4, 8, 1], [0, 0, 5, 0]])), "tensor 0 overlap"),
    ],
)
def test_bad_input(change, message):
    names = ("params", "grads", "exp_avgs", "exp_avg_sqs", "penalties", "steps")
    args = dict(zip(names, make(torch.float32)), mask=torch.ones(4), segments=SEGMENTS, hyper=HYPER)
    change(args)
    with pytest.raises(RuntimeError, match=message):
        masked_adamw_(**args)
