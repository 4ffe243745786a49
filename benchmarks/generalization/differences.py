"""Differences between two variants of a study, with intervals: `masm_detect.evaluation.differences` on its units.

Both variants score the same images, and each seed of both draws the same training images from one pool: the comparison
is paired by image and by seed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from masm_detect.evaluation import differences
from masm_detect.evaluation.differences import Difference, Part, Scored
from masm_detect.results import read_json
from plan import Study

#: seed -> result of one variant in one direction.
Seeds = Mapping[int, dict[str, Any]]
#: variant -> seed -> result of one direction.
Results = dict[str, dict[int, dict[str, Any]]]


def by_variant(results: Iterable[dict[str, Any]]) -> Results:
    """The results of one direction by their variant and seed."""
    table: Results = defaultdict(dict)
    for result in results:
        table[result["variant"]][result["seed"]] = result
    return table


def units_of(study: Study, result: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The images that a run scored: `datasets`, `methods` and `groups`, each [n], in the order of its scores."""
    tiles = result["settings"]["sampling"]["test_tiles"]
    return read_json(folder / study.name / f"units-{result['direction']}-{tiles}.json")


def against_real(datasets: Sequence[str], methods: Sequence[str], forgery: str) -> np.ndarray:
    """Which units, bool [n], measure a forgery: its own, and the real ones of its data set."""
    datasets_, methods_ = np.asarray(datasets), np.asarray(methods)
    own = methods_ == forgery
    return own | ((methods_ == "real") & np.isin(datasets_, datasets_[own]))


def scored_parts(units: Mapping[str, Any], rows: np.ndarray, forgeries: Sequence[str]) -> list[Scored]:
    """The units of each forgery and of the real ones of its data set, with the scores of several runs.

    Args:
        units: `datasets`, `methods` (the forgery or "real") and `groups` (what is left out as one) of each of n units.
        rows: [runs, n] scores.
        forgeries: one part each.
    """
    labels, groups = (np.asarray(units["methods"]) != "real").astype(int), np.asarray(units["groups"]).astype(str)
    kept = [against_real(units["datasets"], units["methods"], forgery) for forgery in forgeries]
    return [Scored(groups[keep], labels[keep], np.asarray(rows)[:, keep]) for keep in kept]


def parts_of(
    units: Mapping[str, Any],
    scores_a: Sequence[Sequence[float]],
    scores_b: Sequence[Sequence[float]],
    forgeries: Sequence[str],
) -> list[Part]:
    """As `scored_parts`, with the scores of two variants a and b, [S, n] each, in the same order of S seeds."""
    found = scored_parts(units, np.array([*scores_a, *scores_b]), forgeries)
    seeds = len(scores_a)
    return [Part(one.groups, one.labels, one.rows[:seeds], one.rows[seeds:]) for one in found]


def paired_parts(
    a: Seeds, b: Seeds, seeds: Sequence[int], units: Mapping[str, Any], forgeries: Sequence[str]
) -> list[Part]:
    """As `parts_of`, from the results of two variants by seed."""
    scores = [[results[seed]["scores"] for seed in seeds] for results in (a, b)]
    return parts_of(units, *scores, forgeries)


def over_directions(
    pairs: Mapping[str, tuple[Seeds, Seeds]], units: Mapping[str, Any], forgeries: Mapping[str, Sequence[str]]
) -> tuple[list[int], list[Part]]:
    """The seeds that both variants have in all directions, and their parts in all of them.

    Args:
        pairs: direction -> results of a and of b.
        units: of every direction: all test the same images.
        forgeries: direction -> one part each.
    """
    seeds = sorted(set.intersection(*(set(a) & set(b) for a, b in pairs.values())))
    parts = [paired_parts(a, b, seeds, units, forgeries[name]) for name, (a, b) in pairs.items()] if seeds else []
    return seeds, [part for own in parts for part in own]


def difference(parts: Sequence[Part]) -> Difference:
    """AUC of a minus AUC of b, the mean over seeds and parts.

    With one seed there is no error: the training varies, and one run cannot tell how much.
    """
    found = differences.difference(parts)
    return found if len(parts[0].a) > 1 else replace(found, sources=(), reason="one seed")


def cells(value: Difference, level: float | None) -> str:
    """Cells of a table: a difference, its 95% interval, that of the corrected level (None: there is none), and p."""
    spans = [None if one is None else value.interval(one) for one in (0.95, level)]
    shown = ["-" if span is None else "[{:+.3f}, {:+.3f}]".format(*span) for span in spans]
    return f"{value.mean:+.3f} | {' | '.join(shown)} | {shown_p(value.p_value())} |"


def shown_p(value: float | None) -> str:
    """A p-value of three digits."""
    if value is None:
        return "-"
    return f"{value:.3f}" if value >= 0.0005 else "< 0.001"
