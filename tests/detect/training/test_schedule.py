"""The learning rate of a step."""

from __future__ import annotations

import pytest
from masm_detect.training.schedule import one_cycle


def test_one_cycle():
    rates = [one_cycle(step, 100, 0.1, 0.01) for step in range(100)]
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01) and rates[0] > 0
    assert one_cycle(0, 1, 0.0, 0.0) == 1.0
