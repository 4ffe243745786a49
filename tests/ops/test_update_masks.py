import pytest
import torch
from mask_states import POLICIES, assert_same, fresh, policy_of, step

from masm_ext import reference
from masm_ext.ops import update_masks_


def run(L, K, policy, steps, coarse=False, decay=0.9, seed=0, rows=5):
    """The op and the formula side by side. Returns the states and the masks seen."""
    generator = torch.Generator().manual_seed(seed)
    got, want, seen = fresh(L, K, rows), fresh(L, K, rows), []
    for _ in range(steps):
        arguments = (*step(L, K, generator, coarse), decay, *policy)
        update_masks_(*got, *arguments)
        reference.update_masks_(*want, *arguments)
        assert_same(got, want)
        seen.append(got[2][1].clone())
    return got, want, torch.stack(seen)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(5, 2), (1, 3), (7, 1), (12, 4)], ids=str)
@pytest.mark.parametrize("coarse", [False, True], ids=["drawn", "ties"])
def test_hundreds_of_steps_match_the_formula(name, shape, coarse):
    L, K = shape
    state, _, seen = run(L, K, policy_of(name, L), 300, coarse, decay=0.0 if coarse else 0.9)
    steps, selections = state[4].tolist()
    assert 200 < steps < 300
    assert selections > 40 if policy_of(name, L)[-1] else selections == 0
    if policy_of(name, L)[-1] and name != "every layer" and L > 1:
        assert (seen == 0).any()
    assert (seen == 1).any() and torch.equal(state[3], state[2][1] != 0)


def test_many_layers():
    run(3000, 2, (1, 2, 0.1, 1500, 0.0, 1, 3, 2, True), 12, rows=2)


@pytest.mark.parametrize("op", [update_masks_, reference.update_masks_])
def test_between_equal_layers_the_earlier_wins(op):
    state = fresh(6, 2)
    stats = torch.ones(12, 2, dtype=torch.float64)
    rest = (torch.zeros(1), torch.ones(6, 2, dtype=torch.bool), 0.0)
    op(*state, stats, *rest, 1, 1, 0.0, 2, 0.0, 1, 0, 1, True)
    assert state[2][1].T.tolist() == [[1, 1, 0, 0, 0, 0]] * 2
    state = fresh(6, 2)
    stats[:, 1] = 2  # snr 1/2 everywhere: no layer is above the threshold, and one must stay
    op(*state, stats, *rest, 1, 1, 0.0, 0, 0.5, 1, 0, 1, True)
    assert state[2][1].T.tolist() == [[1, 0, 0, 0, 0, 0]] * 2


@pytest.mark.parametrize("op", [update_masks_, reference.update_masks_])
@pytest.mark.parametrize("found", [1.0, 2.0])
def test_a_step_that_was_not_taken_changes_nothing(op, found):
    state, *_ = run(5, 2, policy_of("best layers", 5), 20)
    before = [t.clone() for t in state]
    stats, _, owned = step(5, 2, torch.Generator().manual_seed(1))
    op(*state, stats.fill_(float("nan")), torch.tensor([found]), owned, 0.9, *policy_of("best layers", 5))
    assert all(torch.equal(a, b) for a, b in zip(state, before))


@pytest.mark.parametrize("op", [update_masks_, reference.update_masks_])
def test_sums_that_overflow_rank_last(op):
    state, stats = fresh(4, 1), torch.ones(4, 2, dtype=torch.float64)
    stats[0] = float("inf")
    op(*state, stats, torch.zeros(1), torch.ones(4, 1, dtype=torch.bool), 0.0, 1, 1, 0.0, 3, 0.0, 1, 0, 1, True)
    assert state[2][1].flatten().tolist() == [0, 1, 1, 1]


def test_the_history_is_a_ring():
    state = fresh(4, 2, rows=3)
    policy, generator, wanted = (1, 2, 0.1, 2, 0.0, 1, 0, 1, True), torch.Generator().manual_seed(0), {}
    for i in range(1, 16):
        stats, _, owned = step(4, 2, generator)
        update_masks_(*state, stats, torch.zeros(1), owned, 0.9, *policy)
        if i % 2 == 1:
            wanted[i] = state[2][0].clone()
    assert state[4].tolist() == [15, 8] and sorted(state[6].tolist()) == [11, 13, 15]
    for at, row in zip(state[6].tolist(), state[5]):
        assert torch.equal(row[..., 0].float(), wanted[at])
    signal, power = state[0]
    last = state[5][(8 - 1) % 3]
    assert torch.equal(last[..., 2], signal) and torch.equal(last[..., 3], power)
    assert torch.equal(last[..., 1], reference.snr_of(signal, power))


@pytest.mark.parametrize("name", POLICIES)
def test_opcheck(name):
    state, *_ = run(5, 2, policy_of(name, 5), 10)
    stats, _, owned = step(5, 2, torch.Generator().manual_seed(1))
    arguments = (*state, stats, torch.zeros(1), owned, 0.9, *policy_of(name, 5))
    torch.library.opcheck(torch.ops.masm.update_masks_.default, arguments)
