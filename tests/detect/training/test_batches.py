"""Which samples share a batch."""

from __future__ import annotations

from collections import Counter

import pytest
from masm_detect.config import ConfigError
from masm_detect.data.sample import Sample
from masm_detect.training.batches import ORDERS, epoch_batches, forgery_of


def samples(pairs=9, forgeries=("a", "b"), shared=True):
    """`pairs` real samples, and as many fakes of each forgery, of the same groups or of their own."""
    out = [Sample(f"real-{i}", 0, "d", "real", f"d/real/{i}", "", f"g{i}") for i in range(pairs)]
    for name in forgeries:
        for i in range(pairs):
            group = f"g{i}" if shared else f"{name}{i}"
            out.append(Sample(f"{name}-{i}", 1, "d", name, f"d/{name}/{i}", "", group))
    return out


@pytest.mark.parametrize("order", ["random", "paired"])
def test_an_epoch_holds_every_sample_once(order):
    data = samples()
    batches = epoch_batches(data, 4, seed=0, epoch=0, order=order)
    assert Counter(i for batch in batches for i in batch) == Counter(range(len(data)))
    assert max(map(len, batches)) <= 4


@pytest.mark.parametrize("order", ORDERS)
def test_batches_are_a_function_of_seed_and_epoch_and_of_one_number(order):
    data = samples()
    drawn = [epoch_batches(data, 4, seed, epoch, order) for seed in (0, 1) for epoch in (0, 1)]
    assert drawn[0] == epoch_batches(data, 4, 0, 0, order)
    assert len({str(batches) for batches in drawn}) == 4 and len({len(batches) for batches in drawn}) == 1


def test_a_pair_is_in_one_batch():
    data = samples(forgeries=("a",))
    for batch in epoch_batches(data, 6, 0, 0, "paired"):
        assert Counter(data[i].label for i in batch) == {0: len(batch) // 2, 1: len(batch) // 2}
        assert len({data[i].group for i in batch}) == len(batch) // 2


def test_forgeries_without_a_partner_are_spread_over_the_batches():
    data = samples(forgeries=("a", "b", "c", "d"))  # four fakes of every real
    for epoch in range(5):
        batches = epoch_batches(data, 10, 0, epoch, "paired")
        assert Counter(i for batch in batches for i in batch) == Counter(range(len(data)))
        assert all({data[i].label for i in batch} == {0, 1} for batch in batches)


def test_pairs_need_common_groups():
    with pytest.raises(ConfigError, match="none: use random"):
        epoch_batches(samples(shared=False), 4, 0, 0, "paired")
    with pytest.raises(ConfigError, match="at least 2, got 1"):
        epoch_batches(samples(), 1, 0, 0, "paired")


def test_alternating_batches_hold_one_forgery_each_in_turn():
    data = samples(pairs=8)
    batches = epoch_batches(data, 4, 0, 0, "alternating")
    names = [forgery_of(data, batch) for batch in batches]
    assert names == ["a", "b"] * 4
    assert all(sum(data[i].label for i in batch) == 2 and len(batch) == 4 for batch in batches)
    fakes = Counter(i for batch in batches for i in batch if data[i].label)
    assert set(fakes.values()) == {1} and len(fakes) == 16
    reals = Counter(i for batch in batches for i in batch if not data[i].label)
    assert set(reals.values()) == {2}  # twice as many fakes as reals: every real is used equally often
    assert forgery_of(data, range(len(data))) is None and forgery_of(data, [0]) is None


def test_alternating_needs_both_classes():
    with pytest.raises(ConfigError, match="got 9 real, 0 fake"):
        epoch_batches(samples(forgeries=()), 4, 0, 0, "alternating")
