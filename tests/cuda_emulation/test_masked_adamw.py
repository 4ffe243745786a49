"""The kernel of csrc/cuda/masked_adamw.cuh on the CPU, against the reference in float64 and the CPU op."""

import pytest
import torch
from emulated import DTYPES, call
from tolerances import relative_error

from masm_ext import ops, reference

#: as in tests/ops/test_masked_adamw.py
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
#: rows (tensor, begin, end, block) over tensors of 24, 7 and 1,500 elements; one is empty, blocks 1 and 3 have several,
#: and block 4 none
SEGMENTS = [
    (0, 0, 8, 0), (0, 8, 21, 1), (0, 21, 24, 1), (1, 0, 7, 2),
    (2, 3, 900, 3), (2, 900, 1497, 3), (2, 2, 2, 3), (2, 0, 2, 1),
]  # fmt: skip
HYPER = [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.9, 0.99, 1e-6, 0.0], [1e-3, 0.8, 0.999, 1e-8, 0.01]]
STEPS = [0, 3, 10, 100, 7]


class Step:
    """Arguments of one step. shift: elements by which tensors miss the multiple of 16 bytes."""

    def __init__(self, dtypes, mask=(1, 1, 1, 1, 1), scale=None, found_inf=None, shift=0):
        def tensor(n, dtype, draw=torch.randn):
            return draw(n + shift, dtype=torch.float64).to(dtype)[shift:]

        wide = [torch.float64 if d == torch.float64 else torch.float32 for d in dtypes]
        sizes = (24, 7, 1500)
        self.params = [tensor(n, d) for n, d in zip(sizes, dtypes)]
        self.grads = [(tensor(n, d).double() * (scale or 1)).to(d) for n, d in zip(sizes, dtypes)]
        self.m = [0.1 * tensor(n, w) for n, w in zip(sizes, wide)]
        self.v = [0.1 * tensor(n, w, torch.rand) for n, w in zip(sizes, wide)]
        self.penalties = [tensor(n if i != 1 else 0, w) for i, (n, w) in enumerate(zip(sizes, wide))]
        self.steps = torch.tensor(STEPS)
        self.mask = torch.tensor(mask, dtype=torch.float32)
        self.segments = torch.tensor(SEGMENTS)
        self.hyper = torch.tensor(HYPER, dtype=torch.float64)
        self.scale = None if scale is None else torch.tensor([scale])
        self.found_inf = None if found_inf is None else torch.tensor([found_inf])

    def lists(self):
        return self.params, self.grads, self.m, self.v, self.penalties

    def tables(self):
        return self.mask, self.segments, self.hyper, self.scale, self.found_inf

    def clone(self, dtype=None):
        other = object.__new__(Step)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [t.to(dtype or t.dtype, copy=True) for t in value]
            setattr(other, name, value.clone() if isinstance(value, torch.Tensor) else value)
        return other

    def emulate(self, emulated, seed, blocks=3, threads=64, upload=0):
        rows = [[t.data_ptr() if t.numel() else 0 for t in row] + [row[0].numel()] for row in zip(*self.lists())]
        addresses, types = torch.tensor(rows), torch.tensor([DTYPES[p.dtype] for p in self.params])
        T, S, B = len(rows), len(self.segments), len(self.mask)
        stats, found = torch.full((B, 2), torch.nan, dtype=torch.float64), torch.full((1,), torch.nan)
        call(
            emulated("masked_adamw").masked_adamw, addresses, types, T, self.segments, S, self.hyper, self.mask,
            self.steps, B, self.scale, self.found_inf, stats, found, upload, blocks, threads, seed % 2**31,
        )  # fmt: skip
        return stats, found


def same(a, b):
    return all(torch.equal(x, y) for group, other in zip(a.lists(), b.lists()) for x, y in zip(group, other))


KINDS = [[d] * 3 for d in TOLERANCE] + [[torch.bfloat16, torch.float32, torch.float16]]


@pytest.mark.parametrize(
    "dtypes", KINDS, ids=lambda d: "-".join(str(t).removeprefix("torch.") for t in d[:: len(d) - 1])
)
@pytest.mark.parametrize("mask", [(1, 1, 1, 1, 1), (1, 0, 0.25, 1, 1), (0, 0, 0, 0, 0), (0, 1, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("scale,shift", [(None, 0), (1024.0, 1)])
def test_matches_reference_in_float64(dtypes, mask, scale, shift, emulated, seed):
    step = Step(dtypes, mask, scale, shift=shift)
    before, exact = step.clone(), step.clone(torch.float64)
    stats, found = step.emulate(emulated, seed)
    want, _ = reference.masked_adamw_(*exact.lists(), exact.steps, *exact.tables())
    assert found.item() == 0
    for group in (0, 2, 3):
        for dtype, got, ref in zip(dtypes, step.lists()[group], exact.lists()[group]):
            assert relative_error(got, ref) <= TOLERANCE[dtype]
    assert torch.equal(step.steps, exact.steps) and step.steps[4] == STEPS[4]  # no segment, no step
    assert relative_error(stats, want) <= max(TOLERANCE[d] for d in dtypes) + 1e-6
    for t, begin, end, block in SEGMENTS:
        if mask[block] == 0:
            assert stats[block].tolist() == [0, 0]
            for group in (0, 2, 3):
                assert torch.equal(step.lists()[group][t][begin:end], before.lists()[group][t][begin:end])
    for group in (0, 2, 3):  # what belongs to no segment
        assert torch.equal(step.lists()[group][2][1497:], before.lists()[group][2][1497:])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_the_cpu_op_gives_the_same_bits(dtype, emulated, seed):
    """One header of element maths: parameters and moments agree to the bit, the sums to the order they are added in."""
    step = Step([dtype] * 3, (1, 0.5, 1, 0, 1), 64.0)
    other = step.clone()
    stats, _ = step.emulate(emulated, seed)
    want, _ = ops.masked_adamw_(*other.lists(), other.steps, *other.tables())
    assert same(step, other) and torch.equal(step.steps, other.steps)
    assert relative_error(stats, want) <= 1e-14


def test_every_order_and_grid_gives_the_same_bits(emulated):
    """The sums too: neither the grid nor the order in which threads run changes anything."""
    step = Step([torch.bfloat16, torch.float32, torch.float32], (1, 0.5, 1, 1, 1))
    results = []
    for seed in range(40):
        own = step.clone()
        stats, found = own.emulate(emulated, seed, blocks=1 + seed % 9, upload=seed % 2)
        results.append((own, stats, found))
    first, stats, _ = results[0]
    assert all(same(first, own) and torch.equal(stats, other) for own, other, _ in results)


@pytest.mark.parametrize("order", ["sorted by block", "reversed"])
def test_segments_in_any_order(order, emulated, seed):
    step, other = (s := Step([torch.float32] * 3, (1, 0.5, 0, 1, 1))), s.clone()
    rows = sorted(SEGMENTS, key=lambda row: row[3]) if order == "sorted by block" else SEGMENTS[::-1]
    other.segments = torch.tensor(rows)
    stats, _ = step.emulate(emulated, seed)
    reordered, _ = other.emulate(emulated, seed)
    assert same(step, other) and torch.equal(step.steps, other.steps) and relative_error(reordered, stats) <= 1e-14


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [3, 899, 1496])
def test_a_non_finite_gradient_writes_nothing(bad, dtype, at, emulated, seed):
    """3e19 is finite, but its square is not: the second moment would be infinite for good."""
    step = Step([dtype] * 3)
    step.grads[2][at] = bad
    before = step.clone()
    stats, found = step.emulate(emulated, seed)
    assert found.item() == 1 and (stats == 0).all()
    assert torch.equal(step.steps, before.steps)
    assert all(torch.equal(a, b) for g in (0, 2, 3) for a, b in zip(step.lists()[g], before.lists()[g]))
    step.mask[3] = 0  # in a masked block it is not read
    _, found = step.emulate(emulated, seed)
    assert found.item() == 0 and not torch.equal(step.params[0], before.params[0])


def test_a_scaler_that_found_infinities_stops_the_step(emulated, seed):
    step = Step([torch.float32] * 3, found_inf=1.0)
    before = step.clone()
    stats, found = step.emulate(emulated, seed)
    assert found.item() == 1 and (stats == 0).all() and same(step, before) and torch.equal(step.steps, before.steps)
    step.found_inf.zero_()
    assert step.emulate(emulated, seed)[1].item() == 0 and not same(step, before)


@pytest.mark.parametrize(
    "row",
    [(3, 0, 1, 0), (-1, 0, 1, 0), (0, 0, 25, 0), (0, -1, 5, 0), (0, 5, 4, 0), (0, 0, 1, 5), (0, 0, 1, -1)],
    ids=str,
)
def test_invalid_segments_write_nothing(row, emulated, seed):
    step = Step([torch.float32] * 3)
    step.segments[5] = torch.tensor(row)
    before = step.clone()
    stats, found = step.emulate(emulated, seed)
    assert found.item() == 2 and (stats == 0).all() and same(step, before) and torch.equal(step.steps, before.steps)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_invalid_masks_write_nothing(value, emulated, seed):
    step = Step([torch.float32] * 3, (1, value, 1, 1, 1))
    before = step.clone()
    _, found = step.emulate(emulated, seed)
    assert found.item() == 2 and same(step, before)


def test_nothing_to_do(emulated, seed):
    step = Step([torch.float32] * 3)
    step.segments = step.segments[:0]
    before = step.clone()
    stats, found = step.emulate(emulated, seed)
    assert found.item() == 0 and (stats == 0).all() and same(step, before) and torch.equal(step.steps, before.steps)


def test_more_parameters_than_arguments_hold(emulated, seed):
    count, step = 1700, Step([torch.float32] * 3)
    for name in ("params", "grads", "m", "v"):
        setattr(step, name, [getattr(step, name)[1][i % 7 : i % 7 + 1].clone() for i in range(count)])
    step.penalties = [step.penalties[0][i % 7 : i % 7 + i % 2].clone() for i in range(count)]
    step.hyper = step.hyper[:1].expand(count, 5).contiguous()
    step.segments = torch.tensor([[i, 0, 1, i % 5] for i in range(count)])
    other = step.clone()
    stats, _ = step.emulate(emulated, seed, upload=1)
    want, _ = ops.masked_adamw_(*other.lists(), other.steps, *other.tables())
    assert same(step, other) and torch.equal(step.steps, other.steps) and relative_error(stats, want) <= 1e-14
