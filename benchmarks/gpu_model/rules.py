"""A short list of rules that chooses well among strategies, from the seconds of each: measured by tune.py or modelled.

A row is a `Call` and the seconds of every strategy that can serve it. The loss of a choice is its seconds over those of
the best strategy, minus one. Each kind of rows (half precision, tf32, float32; forward, inference or dX) has its own
list. The list starts with the single strategy that is best for all rows. Then the rule that lowers the mean loss most
is put in front, repeatedly, until no rule lowers it by `GAIN`. A rule is a strategy and up to two bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import torch
from torch import Tensor

from masm_ext.ops.strategies import STRATEGIES, STREAM, Call

Row = tuple[Call, dict[str, float]]

#: What a bound may be on, as `masm_ext.ops.strategies.RULES` writes it: sizes, P in each column of tiles, the work.
FEATURES: dict[str, Callable[[Call], int]] = {
    "c.M": lambda c: c.M,
    "c.R": lambda c: c.R,
    "c.IN": lambda c: c.IN,
    "c.OUT": lambda c: c.OUT,
    "c.M * c.OUT": lambda c: c.M * c.OUT,
    "c.OUT * max(c.R, 32)": lambda c: c.OUT * max(c.R, 32),
    "c.M * c.IN * c.OUT": lambda c: c.M * c.IN * c.OUT,
}
KINDS = {
    "c.dtype != torch.float32": lambda c: c.dtype != torch.float32,
    "c.tf32": lambda c: c.dtype == torch.float32 and c.tf32,
    "c.dtype == torch.float32": lambda c: c.dtype == torch.float32 and not c.tf32,
}
PARTS = {
    "not c.backward and c.learning": lambda c: not c.backward and c.learning,
    "not c.learning": lambda c: not c.backward and not c.learning,
    "c.backward": lambda c: c.backward,
}
GAIN = 0.003
MOST_RULES = 4


@dataclass(frozen=True)
class Proposal:
    """`strategy` where `condition` holds and no rule before it does: `rows` rows, with this loss."""

    strategy: str
    condition: str
    rows: int
    mean: float
    worst: float

    def code(self, source: str) -> str:
        """A line for RULES."""
        why = f"{source}: {self.rows} calls, {self.mean:.1%} above the best on average, {self.worst:.0%} at most"
        served = "c.cuda_library and c.M <= STREAM_ROWS and c.R <= STREAM_RANK and " if self.strategy == STREAM else ""
        return f'Rule({self.strategy.upper()}, lambda c: {served}{self.condition}, "{why}"),'


def propose(rows: Sequence[Row]) -> list[Proposal]:
    """Rules for all rows, the lists of the kinds one after another."""
    out = []
    for kind, holds in KINDS.items():
        for part, inside in PARTS.items():
            some = [row for row in rows if holds(row[0]) and inside(row[0])]
            if some:
                out += _list_of(some, f"{kind} and {part}")
    return out


def _list_of(rows: Sequence[Row], prefix: str) -> list[Proposal]:
    # [rows, strategies]; what cannot serve is never chosen
    table = torch.tensor(
        [[times.get(name, float("inf")) for name in STRATEGIES] for _, times in rows], dtype=torch.double
    )
    loss = (table / table.amin(1, keepdim=True) - 1).clamp(max=1e3)
    conditions = _conditions([call for call, _ in rows])
    default = int(loss.mean(0).argmin())
    chosen = torch.full((len(rows),), default)
    rules: list[tuple[int, str, Tensor]] = [(default, "", torch.ones(len(rows), dtype=torch.bool))]
    while conditions and len(rules) < MOST_RULES:
        now = loss.gather(1, chosen[:, None])[:, 0]
        # gain of every condition with every strategy: [conditions, strategies]
        held = torch.stack([mask for _, mask in conditions]).double()
        gains = held @ (now[:, None] - loss) / len(rows)
        best = int(gains.argmax())
        condition, strategy = best // len(STRATEGIES), best % len(STRATEGIES)
        if gains[condition, strategy] < GAIN:
            break
        text, mask = conditions[condition]
        rules.insert(0, (strategy, text, mask))
        chosen = torch.where(mask, strategy, chosen)
    out, left = [], torch.ones(len(rows), dtype=torch.bool)
    for strategy, text, mask in rules:
        here = loss[mask & left, strategy]
        left &= ~mask
        if len(here):
            condition = f"{prefix} and {text}" if text else prefix
            out.append(Proposal(STRATEGIES[strategy], condition, len(here), float(here.mean()), float(here.max())))
    return out


def _conditions(calls: Sequence[Call]) -> list[tuple[str, Tensor]]:
    """(text, rows for which it holds) of every bound that parts the rows, and of every two."""
    single = []
    for text, value in FEATURES.items():
        values = torch.tensor([value(call) for call in calls])
        known = values.unique().tolist()
        for low, high in pairwise(known):
            # the power of two between, where there is one: a bound that reads well and is not tied to a grid
            bound = next((1 << k for k in range(high.bit_length()) if low <= 1 << k < high), low)
            single += [(f"{text} <= {bound}", values <= bound), (f"{text} > {bound}", values > bound)]
    double = [(f"{a} and {b}", x & y) for (a, x), (b, y) in combinations(single, 2)]
    return single + [(text, mask) for text, mask in double if mask.any()]


def losses(rows: Sequence[Row], choose: Callable[[Call], str]) -> list[tuple[Call, str, str, float]]:
    """(call, its choice, the best strategy, loss of the choice), the largest loss first. A choice that was not measured
    has an infinite loss."""
    out = []
    for call, times in rows:
        chosen, best = choose(call), min(times, key=times.__getitem__)
        out.append((call, chosen, best, times.get(chosen, float("inf")) / times[best] - 1))
    return sorted(out, key=lambda row: -row[3])
