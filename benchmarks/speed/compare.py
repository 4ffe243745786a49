"""What moved between two result files by more than their noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from store import load_results

#: Smaller relative changes of a ratio are not reported, however narrow the intervals.
SMALLEST = 0.01


def moved(before: dict[str, float], after: dict[str, float]) -> float | None:
    """Relative change of a ratio if the intervals p20-p80 do not overlap and it is at least SMALLEST, else None."""
    if before["p20"] <= after["p80"] and after["p20"] <= before["p80"]:
        return None
    change = after["median"] / before["median"] - 1
    return change if abs(change) >= SMALLEST else None


def compare(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Two results -> {"moved": [(case, measure, provider, ratio before, ratio after, change)], the largest change
    first; "same": number of ratios that did not move; "only_before", "only_after": what the other lacks; "warnings"}.
    """
    ratios = [_ratios(results) for results in (before, after)]
    common = [key for key in ratios[0] if key in ratios[1]]
    rows = []
    for key in common:
        change = moved(ratios[0][key], ratios[1][key])
        if change is not None:
            rows.append((*key, ratios[0][key]["median"], ratios[1][key]["median"], change))
    rows.sort(key=lambda row: -abs(row[-1]))
    return {
        "moved": rows,
        "same": len(common) - len(rows),
        "only_before": [key for key in ratios[0] if key not in ratios[1]],
        "only_after": [key for key in ratios[1] if key not in ratios[0]],
        "warnings": _warnings(before, after),
    }


def _ratios(results: dict[str, Any]) -> dict[tuple[str, str, str], dict[str, float]]:
    """(case, measure, provider) -> ratio over the baseline; the baseline itself is always 1."""
    return {
        (key, measure, provider): entry["ratio"]
        for key, case in results["cases"].items()
        for measure, table in case["measures"].items()
        for provider, entry in table["providers"].items()
        if "ratio" in entry and provider != table["baseline"]
    }


def _warnings(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Differences that make two files no fair comparison."""
    out = []
    for name in before["settings"]:
        if name not in ("providers", "dtypes") and before["settings"][name] != after["settings"].get(name):
            out.append(f"{name}: {before['settings'][name]} and {after['settings'].get(name)}")
    for what, part in (("device", lambda r: r["device"].get("name")), ("torch", lambda r: r["packages"].get("torch"))):
        names = [sorted({str(part(launch)) for launch in results["launches"]}) for results in (before, after)]
        if names[0] != names[1]:
            out.append(f"{what}: {', '.join(names[0])} and {', '.join(names[1])}")
    return out


def compare_files(before: Path, after: Path) -> str:
    """The comparison as text. Raises ResultError for a file that is no result."""
    found = compare(load_results(before), load_results(after))
    lines = [f"not the same conditions: {warning}" for warning in found["warnings"]]
    for case, measure, provider, old, new, change in found["moved"]:
        word = "better" if change < 0 else "worse"
        lines.append(f"{word:6} {case} {measure} {provider}: {old:.3f} -> {new:.3f} ({change:+.1%})")
    lines.append(
        f"{len(found['moved'])} ratios moved, {found['same']} did not (p20-p80 overlap, or below {SMALLEST:.0%})"
    )
    for name, keys in (("only in the first", found["only_before"]), ("only in the second", found["only_after"])):
        if keys:
            lines.append(f"{name}: {len(keys)} ratios, e.g. {' '.join(keys[0])}")
    return "\n".join(lines)
