"""masm::masked_adamw_ on a GPU against the formula and the CPU."""

import pytest
import torch
from tolerances import relative_error

from masm_ext import reference
from masm_ext.ops import masked_adamw_

pytestmark = pytest.mark.gpu

ADAMW_TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def adamw_step(sizes, dtypes, masks, device, scale=None, shift=0):
    """Arguments of masked_adamw_, two segments a parameter. shift: elements by which memory misses 16 bytes."""

    def draw(dtype, random=torch.randn):
        return [random(n + shift, device=device).to(d)[shift:] for n, d in zip(sizes, dtype)]

    wide = [torch.float64 if d == torch.float64 else torch.float32 for d in dtypes]
    lists = [draw(dtypes), draw(dtypes), draw(wide), draw(wide, torch.rand), draw(wide)]
    lists[4][1] = lists[4][1][:0]  # the second parameter has no penalty
    B = len(masks)
    rows = [
        (t, a, b, (2 * t + i) % B) for t, n in enumerate(sizes) for i, (a, b) in enumerate(((0, n // 3), (n // 3, n)))
    ]
    tables = (
        torch.arange(B),
        torch.tensor(masks, dtype=torch.float32),
        torch.tensor(rows),
        torch.tensor([[1e-2, 0.9, 0.999, 1e-8, 0.1]] * len(sizes), dtype=torch.float64),
        None if scale is None else torch.tensor([scale]),
    )
    return lists, [t if t is None else t.to(device) for t in tables]


def on_the_cpu(lists, tables):
    wide = [[t.to("cpu", torch.float64, copy=True) for t in ts] for ts in lists]
    return wide, [t if t is None else t.to("cpu", copy=True) for t in tables]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("scale", [None, 512.0])
@pytest.mark.parametrize(
    "dtypes", [*([d] * 3 for d in ADAMW_TOLERANCE), [torch.bfloat16, torch.float32, torch.float16]], ids=str
)
def test_masked_adamw(dtypes, scale, shift, device):
    """As the formula in float64, blocks masked and soft, and twice the same bits."""
    masks = (1.0, 0.0, 0.5, 1.0)
    lists, tables = adamw_step((480, 12, 30_011), dtypes, masks, device, scale, shift)
    again = [[t.clone() for t in ts] for ts in lists], [t if t is None else t.clone() for t in tables]
    exact = on_the_cpu(lists, tables)
    stats, found = masked_adamw_(*lists, *tables)
    repeated, _ = masked_adamw_(*again[0], *again[1])
    want, _ = reference.masked_adamw_(*exact[0], *exact[1])
    assert found.item() == 0 and torch.equal(stats, repeated) and torch.equal(tables[0].cpu(), exact[1][0])
    for group in (0, 2, 3):
        for dtype, got, same, ref in zip(dtypes, lists[group], again[0][group], exact[0][group]):
            assert torch.equal(got, same) and relative_error(got.cpu(), ref) <= ADAMW_TOLERANCE[dtype]
    assert relative_error(stats.cpu(), want) <= 1e-6 + max(ADAMW_TOLERANCE[d] for d in dtypes)


def test_masked_adamw_of_more_parameters_than_a_launch_carries(device):
    count = (
        40 if device.type == "cpu" else 2000
    )  # the arguments of a CUDA C++ launch hold 768; the interpreter has none
    lists, tables = adamw_step([9] * count, [torch.float32] * count, [1.0] * 300, device)
    exact = on_the_cpu(lists, tables)
    masked_adamw_(*lists, *tables)
    reference.masked_adamw_(*exact[0], *exact[1])
    assert relative_error(torch.cat(lists[0]).cpu(), torch.cat(exact[0][0])) <= 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 3e19])
def test_masked_adamw_writes_nothing_after_a_bad_gradient(bad, device):
    lists, tables = adamw_step((480, 12, 30_000), [torch.float32] * 3, (1.0, 0.0, 0.5, 1.0), device)
    lists[1][2][9_999] = bad  # the last one of its segment
    before = [[t.clone() for t in ts] for ts in lists]
    stats, found = masked_adamw_(*lists, *tables)
    assert found.item() == 1 and (stats == 0).all() and tables[0].tolist() == [0, 1, 2, 3]
    assert all(torch.equal(a, b) for g in (0, 2, 3) for a, b in zip(lists[g], before[g]))
