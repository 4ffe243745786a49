"""The timer: runs calls of several providers side by side, and computes statistics of their times.

In every round each provider runs once, in a random order, so that a slow minute of the machine, a warm cache or a clock
change affects all of them alike. Ratios are taken inside a round and their median is reported, with the 20th and
80th percentile.
"""

from __future__ import annotations

import gc
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from cases import Case

from masm_ext.progress import Progress

#: On a CPU a sample shorter than this is made of several calls.
SHORTEST_SAMPLE = 1e-3
#: Written before every timed call on CUDA: larger than any L2 cache, so that no provider finds its inputs there. It
#: holds for one call, so a sample on CUDA is one call.
FLUSH_BYTES = 256 << 20
#: Cycles a second that no GPU exceeds, and the longest that a GPU is made to wait for the host: a first run compiles.
FASTEST_CLOCK, LONGEST_WAIT = 2.5e9, 0.02


@dataclass(frozen=True)
class Call:
    """`run` is timed; `setup` runs before it and is not."""

    run: Callable[[], object]
    setup: Callable[[], object] | None = None


def quantile(values: Sequence[float], share: float) -> float:
    """Quantile of `values` with linear interpolation; `share` in [0, 1]."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile."""
    return {"median": quantile(values, 0.5), "p20": quantile(values, 0.2), "p80": quantile(values, 0.8)}


def statistics(samples: Mapping[str, Sequence[float]], baseline: str | None) -> dict[str, dict[str, Any]]:
    """Per provider: `spread` of its samples, their number, and `ratio`: the spread of its sample over the baseline's in
    the same round. Without a baseline, or where it was not measured, there is no ratio.

    Raises ValueError if a provider missed a round.
    """
    counts = {name: len(values) for name, values in samples.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"every provider must have a sample in every round, got {counts}")
    out: dict[str, dict[str, Any]] = {}
    for name, values in samples.items():
        out[name] = {**spread(values), "rounds": len(values)}
        if baseline in samples:
            out[name]["ratio"] = spread([a / b for a, b in zip(values, samples[baseline])])
    return out


def single(value: float, baseline: float | None) -> dict[str, Any]:
    """An entry like those of `statistics` for something that is counted, not sampled (bytes)."""
    entry: dict[str, Any] = {"median": value, "p20": value, "p80": value, "rounds": 1}
    if baseline:
        ratio = value / baseline
        entry["ratio"] = {"median": ratio, "p20": ratio, "p80": ratio}
    return entry


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Seconds of a call: CUDA events on a GPU, the wall clock elsewhere.

    `ahead`: the GPU waits until the host has launched the whole call, so that the time is that of the GPU alone. The
    host's own time is in `host`, seconds of the fastest run of each call (on a CPU the time of the call).
    """

    def __init__(self, device: torch.device, ahead: bool = False) -> None:
        self.ahead = ahead
        self.host: dict[Call, float] = {}
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def seconds(self, call: Call, times: int = 1) -> float:
        if call.setup is not None:
            call.setup()
        if self._flush is None:
            return self._launch(call, times)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        if self.ahead:
            wait = min(LONGEST_WAIT, 1.5 * times * self.host.get(call, 0.0))
            torch.cuda._sleep(int(wait * FASTEST_CLOCK))
        begin.record()
        self._launch(call, times)
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def _launch(self, call: Call, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(times):
            call.run()
        took = (time.perf_counter() - begin) / times
        self.host[call] = min(took, self.host.get(call, took))
        return took


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    *,
    least: int = 5,
    most: int = 1000,
    warm_up: int = 2,
    seed: int = 0,
    progress: str = "",
    on_failure: Callable[[str, Exception], None] | None = None,
    clock: Clock | None = None,
) -> dict[str, list[float]]:
    """Time every call once a round until `seconds` are spent, at least `least` and at most `most` rounds.

    Kernels are compiled and their tiles timed while a call warms up, twice or more on CUDA, never in a sample. A call
    that raises then is handed to `on_failure` and left out; without `on_failure` it raises. Returns seconds by name,
    one entry a round, in the order of the rounds. `progress`: label of a progress bar; `clock`: another than
    `Clock(device)`.
    """
    clock, times, alive = clock or Clock(device), {}, dict(calls)
    on_gpu = device.type == "cuda"
    for name, call in calls.items():
        try:
            took = min(clock.seconds(call) for _ in range(max(2 if on_gpu else 1, warm_up)))
        except Exception as error:
            if on_failure is None:
                raise
            on_failure(name, error)
            del alive[name]
            continue
        # A call with a setup can run only once after it.
        times[name] = (
            1 if on_gpu or call.setup is not None else min(1000, max(1, math.ceil(SHORTEST_SAMPLE / max(took, 1e-9))))
        )
    samples: dict[str, list[float]] = {name: [] for name in alive}
    order, shuffle = list(alive), random.Random(seed).shuffle
    begin, rounds = time.perf_counter(), 0
    with Progress(desc=progress, unit="round", leave=False, disable=not progress) as bar, _no_collection():
        while order and rounds < most and (rounds < least or time.perf_counter() - begin < seconds):
            shuffle(order)
            for name in order:
                samples[name].append(clock.seconds(alive[name], times[name]))
            rounds += 1
            if any(call.setup is not None for call in alive.values()):
                gc.collect()  # what a setup made is large
            bar.update()
            share = min(1.0, (time.perf_counter() - begin) / seconds) if seconds > 0 else 1.0
            bar.set_postfix_str(f"{share:.0%} of {seconds:.0f} s")
    return samples


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector does not run inside, where it would fall on one provider."""
    gc.collect()
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def saved_bytes(forward: Callable[[], object], keep_out: Sequence[torch.Tensor] = ()) -> int:
    """Bytes of the storages that autograd keeps for the backward pass of `forward`, each counted once; those of
    `keep_out` (parameters, buffers, inputs) are not counted.
    """
    known = {t.untyped_storage().data_ptr() for t in keep_out}
    seen: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        # Held until it was counted: a freed storage could come back under the same address.
        kept = forward()
        total = sum(seen.values())
    del kept
    return total


@dataclass(frozen=True)
class Line:
    """`seconds = intercept + slope x` by least squares on relative errors. `residual`: the largest distance of a point
    from the line, over the point."""

    intercept: float
    slope: float
    residual: float
    worst: float


def fit_line(x: Sequence[float], y: Sequence[float]) -> Line:
    """Straight line through (x, y), y > 0, weighted by 1 / y: a small point counts as much as a large one.

    Raises ValueError for fewer than three points: two are always on a line.
    """
    if len(x) < 3 or len(x) != len(y):
        raise ValueError(f"a line needs three points or more, got {len(x)} and {len(y)}")
    a = torch.tensor([[1 / b, c / b] for b, c in zip(y, x)], dtype=torch.float64)
    intercept, slope = torch.linalg.lstsq(a, torch.ones(len(y), 1, dtype=torch.float64)).solution[:, 0].tolist()
    distances = [abs(intercept + slope * c - b) / b for c, b in zip(x, y)]
    worst = max(range(len(y)), key=distances.__getitem__)
    return Line(intercept, slope, distances[worst], float(x[worst]))


class GateError(Exception):
    """A provider whose numbers are wrong."""


class Unavailable(Exception):
    """A provider that cannot be had on this machine or for this case, and why."""


@dataclass
class Outcome:
    """What became of a case: numbers, and every provider that has none, with the reason."""

    case: Case
    measures: dict[str, dict[str, Any]] = field(default_factory=dict)
    errors: dict[str, dict[str, float]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    _load: tuple[float, ...] = field(default_factory=lambda: load_average())
    _begin: float = field(default_factory=time.perf_counter)

    @contextmanager
    def provider(self, name: str) -> Iterator[None]:
        """What goes wrong inside is noted under `name`, and the case goes on without it."""
        try:
            yield
        except GateError as error:
            self.refused[name] = str(error)
        except (ImportError, Unavailable) as error:
            self.unavailable[name] = str(error)
        except Exception as error:
            self.fail(name, error)

    def fail(self, name: str, error: Exception) -> None:
        self.failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:500]

    def add(
        self, measure: str, entries: dict[str, dict[str, Any]], unit: str = "s", baseline: str | None = None
    ) -> None:
        """Entries as `statistics` or `single` make them, by provider. `baseline`: if it is not that of the case."""
        self.measures[measure] = {"unit": unit, "baseline": baseline or self.case.baseline, "providers": entries}

    @property
    def sound(self) -> bool:
        """Did every provider that is here pass the gate and run?"""
        return not self.refused and not self.failed

    def to_dict(self) -> dict[str, Any]:
        case = self.case
        goals = []
        for (measure, provider), limit in case.goals.items():
            entry = self.measures.get(measure, {}).get("providers", {}).get(provider, {})
            # "seconds" goals are about the time itself, all others about the ratio over the baseline
            cell = entry if measure.endswith("seconds") else entry.get("ratio", {})
            goals.append({"measure": measure, "provider": provider, "limit": limit, **judge(cell, limit)})
        return {
            **{name: getattr(case, name) for name in ("suite", "name", "dtype", "baseline", "values")},
            "measures": self.measures,
            "goals": goals,
            **{name: getattr(self, name) for name in ("errors", "refused", "failed", "unavailable", "extra")},
            "load_average": {"before": self._load, "after": load_average()},
            "seconds": round(time.perf_counter() - self._begin, 2),
        }


def judge(cell: Mapping[str, float], limit: float) -> dict[str, Any]:
    """Is the median within `limit`, and is the interval p20-p80 clearly on one side of it? None: not measured."""
    if not cell:
        return {"value": None, "met": None, "clear": None}
    met = cell["median"] <= limit
    clear = cell["p80"] <= limit if met else cell["p20"] > limit
    return {"value": cell["median"], "met": met, "clear": clear}


def load_average() -> tuple[float, ...]:
    """Of 1, 5 and 15 minutes; empty where the system has none."""
    return os.getloadavg() if hasattr(os, "getloadavg") else ()
