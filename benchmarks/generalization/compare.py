"""The difference of any two variants, also of two studies that test the same images, from the stored scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from differences import difference, paired_parts, shown_p, units_of
from masm_detect.config import ConfigError
from masm_detect.evaluation.differences import Part
from plan import STAGES, Study, read_study, runs_of, stored_result

SIDES = ("unseen", "seen")
#: seed -> result of one variant in one direction.
Seeds = Mapping[int, dict[str, Any]]


def compare(a: str, b: str, folder: Path, *, side: str = "unseen", directions: Sequence[str] = ()) -> str:
    """A Markdown table: AUC of a minus AUC of b in each direction, and in all of them together.

    Args:
        a: "study/variant".
        b: the same; of another study only if that tests the same images.
        folder: of the results.
        side: "unseen" or "seen" forgeries.
        directions: their names; none: all of the study of `a`.

    Raises:
        ConfigError: a name is unknown, results are absent, or the two did not test the same images and forgeries.
    """
    (study, name_a), (study_b, name_b) = _named(a), _named(b)
    chosen = list(dict.fromkeys(directions)) or list(study.directions)
    found = {name: (_tested(study, name_a, name, folder), _tested(study_b, name_b, name, folder)) for name in chosen}
    lines = [
        f"AUC of {a} minus AUC of {b}, {side} forgeries, paired by seed and image; not corrected.",
        "",
        f"| direction | seeds | {a} | {b} | difference | 95% interval | p |",
        "|---|---|---|---|---|---|---|",
    ]
    units = []
    for direction, (one, other) in found.items():
        seeds = sorted(set(one) & set(other))
        if not seeds:
            raise ConfigError(f"{a} has the seeds {sorted(one)}, {b} {sorted(other)} in direction {direction}")
        units.append(units_of(study, one[seeds[0]], folder))
        if units[-1] != units_of(study_b, other[seeds[0]], folder):
            raise ConfigError(f"{a} and {b} were tested on other images in direction {direction}")
        forgeries, theirs = (getattr(where.directions[direction], side) for where in (study, study_b))
        if forgeries != theirs or not forgeries:
            raise ConfigError(
                f"{side} forgeries of direction {direction}: {', '.join(forgeries) or 'none'} in {study.name}, "
                f"{', '.join(theirs) or 'none'} in {study_b.name}"
            )
        lines.append(
            _row(f"{direction} ({', '.join(forgeries)})", seeds, paired_parts(one, other, seeds, units[-1], forgeries))
        )
    if len(chosen) > 1:
        lines += _together(study, found, units, side)
    return "\n".join(lines)


def _together(
    study: Study, found: Mapping[str, tuple[Seeds, Seeds]], units: Sequence[dict[str, Any]], side: str
) -> list[str]:
    """The row of all directions, over the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(one) & set(other) for one, other in found.values())))
    if not seeds or any(one != units[0] for one in units):
        return ["", "No row for all directions: they have no seed in common, or other test images."]
    parts = [
        part
        for direction, (one, other) in found.items()
        for part in paired_parts(one, other, seeds, units[0], getattr(study.directions[direction], side))
    ]
    return [_row("all of these", seeds, parts)]


def _row(title: str, seeds: Sequence[int], parts: Sequence[Part]) -> str:
    value = difference(parts)
    interval = value.interval()
    shown = f"- ({value.reason})" if interval is None else "[{:+.3f}, {:+.3f}]".format(*interval)
    return (
        f"| {title} | {', '.join(map(str, seeds))} | {np.mean(value.auc_a):.3f} | {np.mean(value.auc_b):.3f} | "
        f"{value.mean:+.3f} | {shown} | {shown_p(value.p_value())} |"
    )


def _named(text: str) -> tuple[Study, str]:
    """The study and the variant of "study/variant"."""
    name, slash, variant = text.partition("/")
    if not slash:
        raise ConfigError(f"got {text!r}: name a variant as study/variant, for example families/lora")
    study = read_study(name)
    if variant not in study.variants:
        raise ConfigError(f"study {name} has no variant {variant!r}; it has {', '.join(study.variants)}")
    return study, variant


def _tested(study: Study, variant: str, direction: str, folder: Path) -> dict[int, dict[str, Any]]:
    """The results of a variant in one direction, by seed; those of its grid were not tested."""
    if direction not in study.directions:
        raise ConfigError(f"study {study.name} has no direction {direction!r}; it has {', '.join(study.directions)}")
    planned = [run for stage in STAGES for run in runs_of(study, stage, folder, set())]
    own = [run for run in planned if (run.variant, run.direction) == (variant, direction)]
    found = {run.seed: result for run in own if (result := stored_result(run, folder, tested=True)) is not None}
    if not found:
        raise ConfigError(
            f"{study.name}/{variant} has no tested result in direction {direction} in {folder}; name others with "
            "--directions"
        )
    return found
