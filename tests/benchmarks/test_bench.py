"""The interleaved timer, its statistics and straight lines. No test here asserts a time."""

import random
import time

import pytest
import torch

CPU = torch.device("cpu")


def test_ratios_are_taken_inside_a_round():
    import bench

    # The machine is ten times slower in every third round: medians of the times cannot be compared, ratios can.
    slow = [10.0 if i % 3 == 0 else 1.0 for i in range(30)]
    samples = {"frozen": slow, "masm": [1.25 * x for x in slow]}
    entry = bench.statistics(samples, "frozen")["masm"]
    assert entry["ratio"] == pytest.approx({"median": 1.25, "p20": 1.25, "p80": 1.25})
    assert entry["rounds"] == 30 and entry["median"] == pytest.approx(1.25) and entry["p80"] == pytest.approx(12.5)
    assert "ratio" not in bench.statistics({"masm": [1.0]}, "frozen")["masm"]
    with pytest.raises(ValueError, match="every round"):
        bench.statistics({"frozen": [1.0, 1.0], "masm": [1.0]}, "frozen")


def test_quantiles_interpolate():
    import bench

    values = random.Random(0).sample(range(101), 101)
    assert bench.spread(values) == {"median": 50, "p20": 20, "p80": 80}
    assert bench.quantile([3.0], 0.2) == 3.0 and bench.quantile([0.0, 1.0], 0.25) == 0.25


def test_rounds_are_interleaved_and_failures_left_out():
    import bench

    order, failures = [], {}

    def broken():
        raise RuntimeError("no kernel")

    calls = {name: bench.Call(lambda name=name: order.append(name), lambda: None) for name in "abc"}
    calls["broken"] = bench.Call(broken)
    samples = bench.interleave(
        calls, CPU, 0.0, least=7, warm_up=2, on_failure=lambda n, e: failures.__setitem__(n, str(e))
    )
    assert failures == {"broken": "no kernel"} and {n: len(v) for n, v in samples.items()} == dict.fromkeys("abc", 7)
    rounds = [order[i : i + 3] for i in range(6, len(order), 3)]  # after two warm-up calls of each
    assert len(rounds) == 7 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1
    with pytest.raises(RuntimeError, match="no kernel"):
        bench.interleave({"broken": calls["broken"]}, CPU, 0.0)


def test_a_slow_first_call_is_in_no_sample(monkeypatch):
    """Kernels are compiled, and tiles timed, by the first call."""
    import bench

    monkeypatch.setattr(bench.Clock, "__init__", lambda self, device, ahead=False: vars(self).update(
        ahead=ahead, host={}, _flush=None))  # fmt: skip
    calls = []

    def call():
        calls.append(1)
        if len(calls) == 1:
            time.sleep(0.05)

    samples = bench.interleave({"a": bench.Call(call)}, torch.device("cuda"), 0.0, least=6, warm_up=1)
    assert len(calls) == 2 + 6 and max(samples["a"]) < 0.05  # on CUDA two warm-ups, and one call a sample


def test_the_host_is_ahead_of_the_gpu(monkeypatch):
    import bench

    seen = []

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            seen.append("record")

        def synchronize(self):
            pass

        def elapsed_time(self, other):
            return 2.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: seen.append(cycles))
    clock, call = bench.Clock(CPU, ahead=True), bench.Call(lambda: (seen.append("run"), time.sleep(0.01)))
    clock._flush = torch.ones(4)
    assert clock.seconds(call) == 2e-3 and seen == [0, "record", "run", "record"] and not clock._flush.any()
    seen.clear()
    host = clock.host[call]
    clock.seconds(call)
    # the GPU sleeps longer than the host needs to launch the call, as far as it is known
    assert host >= 0.01 and seen[0] >= host * 2e9 and seen[1:] == ["record", "run", "record"]
    clock.host[call] = 30.0  # a first run that compiled: the GPU does not wait for another
    seen.clear()
    clock.seconds(call)
    assert seen[0] <= bench.LONGEST_WAIT * bench.FASTEST_CLOCK and clock.host[call] < 1
    seen.clear()
    plain = bench.Clock(CPU)
    plain._flush = torch.ones(4)
    plain.seconds(call)
    assert seen == ["record", "run", "record"]


def test_a_straight_line_is_found_and_a_bend_told():
    import bench

    x = [1, 2, 4, 8, 16]
    line = bench.fit_line(x, [3 + 2 * v for v in x])
    assert (line.intercept, line.slope) == pytest.approx((3, 2)) and line.residual < 1e-9
    bent = bench.fit_line(x, [3 + 2 * v + (40 if v == 8 else 0) for v in x])
    assert bent.residual > 0.2
    with pytest.raises(ValueError, match="three points"):
        bench.fit_line([1, 2], [1, 2])


def test_goals_know_noise():
    import bench

    assert bench.judge({"median": 1.0, "p20": 0.9, "p80": 1.05}, 1.1) == {"value": 1.0, "met": True, "clear": True}
    assert bench.judge({"median": 1.0, "p20": 0.9, "p80": 1.2}, 1.1) == {"value": 1.0, "met": True, "clear": False}
    assert bench.judge({"median": 1.2, "p20": 1.0, "p80": 1.3}, 1.1) == {"value": 1.2, "met": False, "clear": False}
    assert bench.judge({}, 1.1)["met"] is None


def test_saved_bytes_counts_a_storage_once():
    import bench

    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(16, requires_grad=True)
    assert bench.saved_bytes(lambda: (x.exp() * 2).sum(), [x]) == 8 * 16 * 4  # exp keeps its result
    assert bench.saved_bytes(lambda: (x * w).sum(), [x, w]) == 0
    assert bench.saved_bytes(lambda: (x * w).sum(), [w]) == 8 * 16 * 4
