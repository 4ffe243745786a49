"""masm::masked_adamw_ and masm::update_masks_ in Triton, against the formula in float64."""

from types import SimpleNamespace

import pytest
import torch
from guarded import guarded
from mask_states import POLICIES, assert_same, fresh, policy_of, step
from tolerances import relative_error

from masm_ext import reference
from masm_ext.kernels import masked_adamw as kernels
from masm_ext.kernels.update_masks import update_masks_

#: as in tests/ops/test_masked_adamw.py
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-7, torch.bfloat16: 4e-3, torch.float16: 5e-4}
#: rows (tensor, begin, end, block) over tensors of 24, 7 and 3,000 elements; one is empty, blocks 1 and 3 have several,
#: not side by side, and block 4 none
SEGMENTS = [
    (0, 0, 8, 0), (0, 8, 21, 1), (0, 21, 24, 1), (1, 0, 7, 2),
    (2, 3, 1500, 3), (2, 1500, 2997, 3), (2, 2, 2, 3), (2, 0, 2, 1),
]  # fmt: skip
HYPER = [[1e-2, 0.9, 0.999, 1e-8, 0.1], [3e-3, 0.9, 0.99, 1e-6, 0.0], [1e-3, 0.8, 0.999, 1e-8, 0.01]]
KINDS = [[d] * 3 for d in TOLERANCE] + [[torch.bfloat16, torch.float32, torch.float16]]


def make(dtypes, mask=(1, 1, 1, 1, 1), scale=None, found_inf=None):
    wide = [torch.float64 if d == torch.float64 else torch.float32 for d in dtypes]
    sizes = (24, 7, 3000)
    lists = [
        [torch.randn(n, dtype=torch.float64).to(d) for n, d in zip(sizes, dtypes)],
        [(torch.randn(n, dtype=torch.float64) * (scale or 1)).to(d) for n, d in zip(sizes, dtypes)],
        [0.1 * torch.randn(n, dtype=w) for n, w in zip(sizes, wide)],
        [0.1 * torch.rand(n, dtype=w) for n, w in zip(sizes, wide)],
        [torch.randn(n if i != 1 else 0, dtype=w) for i, (n, w) in enumerate(zip(sizes, wide))],
    ]
    tables = [
        torch.tensor([0, 3, 10, 100, 7]),
        torch.tensor(mask, dtype=torch.float32),
        torch.tensor(SEGMENTS),
        torch.tensor(HYPER, dtype=torch.float64),
        None if scale is None else torch.tensor([scale]),
        None if found_inf is None else torch.tensor([found_inf]),
    ]
    return lists, tables


def copies(lists, tables, dtype=None):
    same = [[t.to(dtype or t.dtype, copy=True) for t in ts] for ts in lists]
    return same, [tables[0].clone(), *tables[1:]]


@pytest.mark.parametrize("dtypes", KINDS, ids=lambda d: "-".join(str(t) for t in d[:: len(d) - 1]))
@pytest.mark.parametrize("mask", [(1, 1, 1, 1, 1), (1, 0, 0.25, 1, 1), (0, 0, 0, 0, 0), (0, 1, 1, 0, 1)], ids=str)
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_a_step_matches_the_formula(dtypes, mask, scale):
    lists, tables = make(dtypes, mask, scale)
    exact, exact_tables = copies(lists, tables, torch.float64)
    before, _ = copies(lists, tables)
    stats, found = kernels.masked_adamw_(*lists, *tables)
    want, _ = reference.masked_adamw_(*exact, *exact_tables)
    assert found.item() == 0 and torch.equal(tables[0], exact_tables[0])
    for group in (0, 2, 3):
        for dtype, got, ref in zip(dtypes, lists[group], exact[group]):
            assert relative_error(got, ref) <= TOLERANCE[dtype]
    assert relative_error(stats, want) <= max(TOLERANCE[d] for d in dtypes) + 1e-6
    assert (stats[0] == 0).all()  # its first step
    for t, begin, end, block in SEGMENTS:
        if mask[block] == 0:
            for group in (0, 2, 3):
                assert torch.equal(lists[group][t][begin:end], before[group][t][begin:end])
    for group in (0, 2, 3):  # what belongs to no segment
        assert torch.equal(lists[group][2][2997:], before[group][2][2997:])


@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_is_touched_outside_of_the_inputs(at_end):
    lists, tables = make([torch.float32] * 3)
    lists = [[guarded(t, at_end) if t.numel() else t for t in ts] for ts in lists]
    tables = [t if t is None else guarded(t, at_end) for t in tables]
    exact, exact_tables = copies(lists, tables, torch.float64)
    kernels.masked_adamw_(*lists, *tables)
    reference.masked_adamw_(*exact, *exact_tables)
    assert all(relative_error(a, b) <= 3e-7 for a, b in zip(lists[0], exact[0]))


def test_the_order_of_the_segments_changes_no_parameter():
    lists, tables = make([torch.float32] * 3, (1, 0.5, 0, 1, 1))
    other, other_tables = copies(lists, tables)
    other_tables[2] = tables[2].flip(0).contiguous()
    stats, _ = kernels.masked_adamw_(*lists, *tables)
    again, _ = kernels.masked_adamw_(*other, *other_tables)
    assert all(torch.equal(a, b) for group in (0, 2, 3) for a, b in zip(lists[group], other[group]))
    assert torch.equal(tables[0], other_tables[0]) and relative_error(again, stats) <= 1e-14


def unchanged(lists, tables, before, before_tables):
    same = all(torch.equal(a, b) for group in (0, 2, 3) for a, b in zip(lists[group], before[group]))
    return same and torch.equal(tables[0], before_tables[0])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("at", [3, 1499, 2996])
def test_a_non_finite_gradient_writes_nothing(bad, dtype, at):
    lists, tables = make([dtype] * 3)
    lists[1][2][at] = bad
    before = copies(lists, tables)
    stats, found = kernels.masked_adamw_(*lists, *tables)
    assert found.item() == 1 and (stats == 0).all() and unchanged(lists, tables, *before)
    tables[1][3] = 0  # in a masked block it is not even looked at
    assert kernels.masked_adamw_(*lists, *tables)[1].item() == 0


def test_a_scaler_that_found_infinities_stops_the_step():
    lists, tables = make([torch.float32] * 3, found_inf=1.0)
    before = copies(lists, tables)
    assert kernels.masked_adamw_(*lists, *tables)[1].item() == 1 and unchanged(lists, tables, *before)
    tables[-1].zero_()
    assert kernels.masked_adamw_(*lists, *tables)[1].item() == 0 and not unchanged(lists, tables, *before)


@pytest.mark.parametrize(
    "row",
    [(3, 0, 1, 0), (-1, 0, 1, 0), (0, 0, 25, 0), (0, -1, 5, 0), (0, 5, 4, 0), (0, 0, 1, 5), (0, 0, 1, -1)],
    ids=str,
)
def test_invalid_segments_write_nothing(row):
    lists, tables = make([torch.float32] * 3)
    tables[2][5] = torch.tensor(row)
    before = copies(lists, tables)
    stats, found = kernels.masked_adamw_(*lists, *tables)
    assert found.item() == 2 and (stats == 0).all() and unchanged(lists, tables, *before)


@pytest.mark.parametrize("value", [-0.5, 1.5, float("nan")])
def test_invalid_masks_write_nothing(value):
    lists, tables = make([torch.float32] * 3, (1, 1, 1, 1, value))  # of the block without a segment
    before = copies(lists, tables)
    assert kernels.masked_adamw_(*lists, *tables)[1].item() == 2 and unchanged(lists, tables, *before)


def test_nothing_to_do():
    lists, tables = make([torch.float32] * 3)
    tables[2] = tables[2][:0]
    before = copies(lists, tables)
    stats, found = kernels.masked_adamw_(*lists, *tables)
    assert found.item() == 0 and (stats == 0).all() and unchanged(lists, tables, *before)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(5, 2), (1, 3), (37, 1)], ids=str)
@pytest.mark.parametrize("coarse", [False, True], ids=["drawn", "ties"])
def test_masks_match_the_formula(name, shape, coarse, seed):
    L, K = shape
    generator = torch.Generator().manual_seed(seed)
    got, want = fresh(L, K), fresh(L, K)
    for _ in range(25):
        arguments = (*step(L, K, generator, coarse), 0.0 if coarse else 0.9, *policy_of(name, L))
        update_masks_(*got, *arguments)
        reference.update_masks_(*want, *arguments)
        assert_same(got, want)


def test_more_blocks_than_one_tile():
    generator = torch.Generator().manual_seed(0)
    got, want = fresh(400, 2), fresh(400, 2)
    for _ in range(4):
        arguments = (*step(400, 2, generator), 0.9, 1, 2, 0.1, 200, 0.0, 1, 3, 2, True)
        update_masks_(*got, *arguments)
        reference.update_masks_(*want, *arguments)
        assert_same(got, want)


def test_sums_that_overflow_rank_as_noise():
    state = fresh(4, 1)
    stats = torch.tensor([[float("inf"), float("inf")], [1, 1], [0.5, 1], [-0.5, 1]], dtype=torch.float64)
    rest = (torch.zeros(1), torch.ones(4, 1, dtype=torch.bool), 0.0, 1, 1, 0.0, 3, 0.0, 1, 0, 1, True)
    update_masks_(*state, stats, *rest)
    assert state[2][1].flatten().tolist() == [1, 1, 1, 0]


def test_addresses_go_up_once_and_a_capture_has_memory_of_its_own(monkeypatch):
    """Seen without a GPU: the device of the tensors is said to be one, and what is special about it is patched."""
    uploads, capturing = [], [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(kernels, "_pinned", lambda shape: torch.empty(shape, dtype=torch.int64))
    upload = kernels._upload
    monkeypatch.setattr(
        kernels, "_upload", lambda rows, pinned, device: uploads.append(pinned) or upload(rows, pinned, "cpu")
    )
    for name in ("_tables", "_spare", "_captured"):
        monkeypatch.setattr(kernels, name, type(getattr(kernels, name))())
    lists = make([torch.float32] * 3)[0]

    def table():
        return kernels._table(*lists, torch.device("cuda"))

    want = table()
    assert table() is want and len(uploads) == 1
    for _ in range(3):  # captured, warmed up, captured again
        capturing[0] = True
        assert torch.equal(table(), want) and torch.equal(table(), want)
        with pytest.raises(RuntimeError, match="take one step over them outside of a graph before each capture"):
            table()
        capturing[0] = False
        assert table() is want
    assert len({t.data_ptr() for t in kernels._captured}) == 6
    lists[1][0] = lists[1][0].clone()  # a gradient that came to lie elsewhere
    assert not torch.equal(table(), want)
