"""The kernel of csrc/cuda/update_masks.cuh on the CPU, against the formula and the CPU op."""

import pytest
import torch
from emulated import call
from mask_states import POLICIES, assert_same, fresh, policy_of, step

from masm_ext import ops, reference


def emulate(emulated, state, arguments, threads, seed):
    *policy, select = arguments
    L, K = state[3].shape
    call(
        emulated("update_masks").update_masks, *state, *policy, int(select), L, K, len(state[6]), threads, seed % 2**31
    )  # fmt: skip


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("shape", [(5, 2), (1, 3), (37, 1)], ids=str)
@pytest.mark.parametrize("coarse", [False, True], ids=["drawn", "ties"])
def test_steps_match_the_formula_and_the_cpu_op(name, shape, coarse, emulated, seed):
    L, K = shape
    generator = torch.Generator().manual_seed(seed % 2**31)
    got, formula, cpu = (fresh(L, K) for _ in range(3))
    for i in range(40):
        arguments = (*step(L, K, generator, coarse), 0.0 if coarse else 0.9, *policy_of(name, L))
        emulate(emulated, got, arguments, threads=32, seed=seed + i)  # fewer threads than blocks, and more
        reference.update_masks_(*formula, *arguments)
        ops.update_masks_(*cpu, *arguments)
        assert_same(got, formula)
        assert all(torch.equal(a, b) for a, b in zip(got, cpu))  # one header of maths: the same bits


def test_every_order_gives_the_same_bits(emulated):
    """Each step selects anew."""
    generator = torch.Generator().manual_seed(3)
    draws = [step(40, 3, generator)[0] for _ in range(6)]
    policy = (1, 1, 0.3, 20, 0.0, 1, 1, 2, True)
    first = None
    for seed in range(30):
        state = fresh(40, 3)
        for i, stats in enumerate(draws):
            arguments = (stats, torch.zeros(1), torch.ones(40, 3, dtype=torch.bool), 0.0, *policy)
            emulate(emulated, state, arguments, threads=(32, 64, 128)[seed % 3], seed=seed + i)
        first = first or state
        assert state[4].tolist() == [6, 6] and all(torch.equal(a, b) for a, b in zip(state, first))
    selected = first[5][:5, ..., 0]
    assert (selected[1:] != selected[:-1]).any(-1).any(-1).all()
