"""The difference of any two variants, also of two studies that test the same images, from the stored scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from differences import Seeds, difference, over_directions, paired_parts, shown_p, units_of
from masm_detect.config import ConfigError
from masm_detect.evaluation.differences import Part
from plan import STAGES, Study, changed, read_study, runs_of, stored_result

SIDES = ("unseen", "seen")
#: Stages whose runs are tested.
TESTED = tuple(stage for stage in STAGES if stage != "grid")


def compare(a: str, b: str, folder: Path, *, side: str = "unseen", directions: Sequence[str] = ()) -> str:
    """A Markdown table: AUC of `a` minus AUC of `b` in each direction, and over all of them. A line below it lists the
    other settings that differ: the difference includes their effect.

    Args:
        a: "study/variant".
        b: as `a`; it may be of another study if both test the same images.
        folder: the folder with the results.
        side: "unseen" or "seen" forgeries.
        directions: names of directions; none: all of the study of `a`.

    Raises:
        ConfigError: a name is unknown, results are absent, or the two did not learn from the same images and forgeries,
            or were not tested on the same.
        ResultError: the record of what was tested is absent.
    """
    (study, name_a), (study_b, name_b) = _named(a), _named(b)
    chosen = list(dict.fromkeys(directions)) or list(study.directions)
    all_a, all_b = _tested(study, name_a, chosen, folder), _tested(study_b, name_b, chosen, folder)
    found = {name: (all_a[name], all_b[name]) for name in chosen}
    lines = [
        f"AUC of {a} minus AUC of {b}, {side} forgeries, paired by seed and image; not corrected.",
        "",
        f"| direction | seeds | {a} | {b} | difference | 95% interval | p |",
        "|---|---|---|---|---|---|---|",
    ]
    units, notes = [], {}
    for direction, (one, other) in found.items():
        seeds = sorted(set(one) & set(other))
        if not seeds:
            raise ConfigError(f"{a} has the seeds {sorted(one)}, {b} {sorted(other)} in direction {direction}")
        units.append(units_of(study, one[seeds[0]], folder))
        if units[-1] != units_of(study_b, other[seeds[0]], folder):
            raise ConfigError(f"{a} and {b} were tested on other images in direction {direction}")
        _check_same_data(direction, (study, one), (study_b, other), seeds)
        forgeries = getattr(study.directions[direction], side)
        if not forgeries:
            raise ConfigError(f"study {study.name} has no {side} forgeries in direction {direction}")
        notes |= dict.fromkeys(_other_settings(one[seeds[0]], other[seeds[0]]))
        lines.append(
            _row(f"{direction} ({', '.join(forgeries)})", seeds, paired_parts(one, other, seeds, units[-1], forgeries))
        )
    if len(chosen) > 1:
        lines += _together(study, found, units, side)
    if notes:
        lines += ["", f"Besides the method they differ in {'; '.join(notes)}."]
    return "\n".join(lines)


def _check_same_data(direction: str, a: tuple[Study, Seeds], b: tuple[Study, Seeds], seeds: Sequence[int]) -> None:
    """Both learned from the same forgeries and images, as far as the results say (older ones do not)."""
    for side in SIDES:
        names = [", ".join(getattr(study.directions[direction], side)) or "none" for study, _ in (a, b)]
        if names[0] != names[1]:
            raise ConfigError(
                f"{side} forgeries of direction {direction}: {names[0]} in {a[0].name}, {names[1]} in {b[0].name}"
            )
    for seed in seeds:
        known = {results[seed].get("learned_sha256") for _, results in (a, b)} - {None}
        if len(known) > 1:
            raise ConfigError(f"seed {seed} of direction {direction}: the two learned from other images")


def _other_settings(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """In what two results differ besides their study and method."""
    kept = [{name: v for name, v in one["settings"].items() if name not in ("study", "method")} for one in (a, b)]
    return [line.replace(" was ", ": ", 1).replace(", is ", " and ", 1) for line in changed(kept[0], kept[1])]


def _together(
    study: Study, found: Mapping[str, tuple[Seeds, Seeds]], units: Sequence[dict[str, Any]], side: str
) -> list[str]:
    """The row of all directions, over the seeds that all of them have."""
    alike = all(one == units[0] for one in units)
    forgeries = {name: getattr(study.directions[name], side) for name in found}
    seeds, parts = over_directions(found, units[0], forgeries) if alike else ([], [])
    if not seeds:
        return ["", "No row for all directions: they have no seed in common, or other test images."]
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


def _tested(study: Study, variant: str, directions: Sequence[str], folder: Path) -> dict[str, Seeds]:
    """The tested results of a variant: direction -> seed -> result."""
    for name in directions:
        if name not in study.directions:
            raise ConfigError(f"study {study.name} has no direction {name!r}; it has {', '.join(study.directions)}")
    waiting: set[str] = set()
    found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in directions}
    for run in (run for stage in TESTED for run in runs_of(study, stage, folder, waiting)):
        if run.variant != variant or run.direction not in found:
            continue
        result = stored_result(run, folder, tested=True)
        if result is not None and found[run.direction].setdefault(run.seed, result)["key"] != run.key:
            raise ConfigError(f"{study.name}/{variant} has two results of seed {run.seed} in direction {run.direction}")
    for name, results in found.items():
        if not results and variant in waiting:
            raise ConfigError(f"{study.name}/{variant} has no tested result: its grid is not complete")
        if not results:
            raise ConfigError(
                f"{study.name}/{variant} has no tested result in direction {name} in {folder}; name others with "
                "--directions"
            )
    return found
