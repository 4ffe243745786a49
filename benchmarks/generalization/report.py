"""Tables and figures of the studies, from the files that `study.py run` wrote: `results/<study>.md` and `.png`."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from differences import Results, by_variant, cells, difference, over_directions, paired_parts, scored_parts, units_of
from factorial import FACTORS, effects, levels_of
from masm_detect.config import ConfigError
from masm_detect.evaluation.differences import Difference, holm
from masm_detect.report.plots import METHOD_COLORS, new_figure, save_figure
from masm_detect.results import read_json, write_text
from plan import GridIncomplete, Study, make_run, read_study, runs_of


def report(studies: Sequence[str], folder: Path) -> int:
    """Write the report of each study that has results, and print it."""
    names = list(studies) or sorted(path.name for path in folder.iterdir() if any(path.glob("*--seed*.json")))
    for name in names:
        results = [read_json(file) for file in sorted((folder / name).glob("*--seed*.json"))]
        if not results:
            raise ConfigError(f"there are no results of {name!r} in {folder}")
        study = read_study(name)
        text = study_report(study, results, folder)
        write_text(folder / f"{name}.md", text)
        print(text)
    return 0


def study_report(study: Study, results: Sequence[dict[str, Any]], folder: Path) -> str:
    """The Markdown report of one study; draws its figures into `folder`."""
    costs, by_key = _costs(study, folder), {result["key"]: result for result in results}
    _check_learned(results)
    lines = [
        f"# {study.name}: {study.title}",
        "",
        f"{study.backbone}, {study.image_size} px, {study.precision}. {study.caution}",
        "",
        _origins(results),
        "",
        "AUC by image: mean over seeds. +-: standard deviation over seeds. Each seed draws its training images anew "
        "from one pool, so that two seeds share many of them. A difference is over the seeds that both variants have; "
        "Holm's correction is over the comparisons of its table."
        + (" Time and memory: of a training step in float32 with one thread." if costs else ""),
    ]
    for stage in ("final", "controls"):
        tables: dict[str, Results] = {}
        keys = {run.key for run in runs_of(study, stage, folder, set())}
        for direction in study.directions:
            own = by_variant(
                r for key, r in by_key.items() if key in keys and "auc" in r and r["direction"] == direction
            )
            if own:
                tables[direction] = own
                lines += ["", f"## {stage.capitalize()}: trained on {', '.join(study.directions[direction].seen)}", ""]
                lines += _scores(study, direction, own, costs)
                if absent := [variant for variant in study.stages[stage]["variants"] if variant not in own]:
                    lines += ["", f"Planned, without results: {', '.join(absent)}."]
                if stage == "final" and study.reference is not None:
                    where = study.directions[direction]
                    for side, forgeries in (("unseen", where.unseen), ("seen", where.seen)):
                        lines += _differences(study, direction, own, folder, side, forgeries) if forgeries else []
        if stage == "final" and study.reference is not None:
            lines += _overall(study, tables, folder)
    lines += _factorial(study, by_key, folder) + _grid(study, results, folder)
    return "\n".join(lines) + "\n"


def _origins(results: Sequence[dict[str, Any]]) -> str:
    """On which processors, with which torch and at which commits the results were computed."""
    counts: dict[str, Counter[str]] = {"Processors": Counter(), "torch": Counter(), "commits": Counter()}
    for result in results:
        made = result["provenance"]
        git = made["git"] or {"commit": "unknown", "modified": False}
        counts["Processors"][made["device"]["name"]] += 1
        counts["torch"][made["packages"]["torch"]] += 1
        counts["commits"][git["commit"][:7] + " with changes" * git["modified"]] += 1
    parts = [
        f"{title}: {', '.join(f'{name} ({number} runs)' for name, number in found.most_common())}"
        for title, found in counts.items()
    ]
    return f"{len(results)} runs. {'; '.join(parts)}."


def _check_learned(results: Sequence[dict[str, Any]]) -> None:
    """Runs of one direction and seed learned from the same images, as far as their results say (older ones do not).

    Raises:
        ConfigError: they did not.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for result in results:
        if "learned_sha256" in result:
            same = json.dumps([result["direction"], result["seed"], result["settings"]["sampling"]])
            found[same].setdefault(result["learned_sha256"], result["key"])
    for keys in found.values():
        if len(keys) > 1:
            raise ConfigError(f"{' and '.join(keys.values())} learned from other images: was the data set changed?")


def _factorial(study: Study, by_key: Mapping[str, dict[str, Any]], folder: Path) -> list[str]:
    """The effects of the factors on the AUC of unseen forgeries, their mean."""
    runs = list(runs_of(study, "factorial", folder, set()))
    done = [run for run in runs if run.key in by_key]
    if not done:
        return []
    lines = ["", "## Factorial: effects on the mean AUC of the unseen forgeries", ""]
    if len(done) < len(runs):
        return [*lines, f"{len(done)} of {len(runs)} runs are done: no effects before all are."]
    if len(study.directions) > 1:
        raise ConfigError(f"study {study.name}: a factorial has one direction, got {', '.join(study.directions)}")
    units, unseen = units_of(study, by_key[runs[0].key], folder), runs[0].unseen
    parts = scored_parts(units, np.array([by_key[run.key]["scores"] for run in runs]), unseen)
    lines += effects([run.variant for run in runs], [run.seed for run in runs], parts)
    lines += [
        "",
        "Means over runs, as they are:",
        "",
        "| factor | level | runs | validation AUC |",
        "|---|---|---|---|",
    ]
    for place, (factor, levels) in enumerate(FACTORS.items()):
        for level in levels:
            values = [by_key[run.key]["val_auc"] for run in runs if levels_of(run.variant)[place] == level]
            lines.append(f"| {factor} | {level} | {len(values)} | {np.mean(values):.3f} |")
    return lines


def _scores(study: Study, direction: str, table: Results, costs: Mapping[str, Any]) -> list[str]:
    seen, unseen = study.directions[direction].seen, study.directions[direction].unseen
    columns = [*seen, *unseen]
    titles = [f"{name} (unseen)" if name in unseen else name for name in columns]
    if len(unseen) > 1:
        titles.append("mean unseen")
    titles = ["variant", "seeds", *titles, "trained weights"]
    titles += ["step time, LoRA = 1", "step memory, MiB"] if costs else []
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for variant, seeds in table.items():
        values = {name: [result["auc"][name] for result in seeds.values()] for name in columns}
        cells = [_mean(values[name]) for name in columns]
        if len(unseen) > 1:
            cells.append(_mean(np.mean([values[name] for name in unseen], axis=0)))
        one = next(iter(seeds.values()))
        trained = f"{one['trainable_parameters']:,}" if "trainable_parameters" in one else "-"
        cells = [variant, str(len(seeds)), *cells, trained]
        if costs:
            step = costs.get(variant)
            cells += [f"{step['time_ratio']:.2f}", str(step["mebibytes"])] if step else ["-", "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _costs(study: Study, folder: Path) -> dict[str, Any]:
    """What `study.py cost` measured of each variant; nothing if it was not run."""
    file = folder / (study.settings_from or study.name) / "cost.json"
    return read_json(file)["variants"] if file.is_file() else {}


def _mean(values: Sequence[float]) -> str:
    deviation = f" +- {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _paired(table: Results, a: str, b: str, units: Mapping[str, Any], forgeries: Sequence[str]) -> Difference | None:
    """The difference of two variants over the seeds that both have; None without one."""
    seeds = sorted(set(table.get(a, {})) & set(table.get(b, {})))
    return difference(paired_parts(table[a], table[b], seeds, units, forgeries)) if seeds and forgeries else None


def _differences(
    study: Study, direction: str, table: Results, folder: Path, side: str, forgeries: Sequence[str]
) -> list[str]:
    """The reference variant against every other one on the forgeries of one side; draws those of the main one."""
    reference = study.reference
    if reference not in table:
        return ["", f"{reference}, with which the others are compared, has no results yet."]
    units = units_of(study, next(iter(table[reference].values())), folder)
    found = {
        other: value
        for other in table
        if other != reference and (value := _paired(table, reference, other, units, forgeries))
    }
    levels = holm({other: value.p_value() for other, value in found.items()})
    lines = [
        "",
        f"{reference} minus each other variant, {side} forgeries ({', '.join(forgeries)}), paired by seed and image:",
        "",
        "| against | seeds | difference | 95% interval | excludes 0 if Holm rejects | p |",
        "|---|---|---|---|---|---|",
    ]
    for other, value in found.items():
        lines.append(f"| {other} | {len(value.per_seed)} | {cells(value, levels.get(other))}")
    if found and (side == "unseen" or not study.directions[direction].unseen):
        name = f"{study.name}-{direction}.png"
        _forest(found, levels, folder / name, f"{study.name}: {reference} minus others, {side} forgeries")
        lines += ["", f"![{reference} minus each other variant]({name})"]
    return lines


def _overall(study: Study, tables: Mapping[str, Results], folder: Path) -> list[str]:
    """The reference against every variant that all directions have, on the mean over directions of the unseen
    forgeries; nothing if there are fewer than two directions, or other units in one of them.
    """
    reference = study.reference
    units = [units_of(study, next(iter(next(iter(t.values())).values())), folder) for t in tables.values()]
    if len(tables) < len(study.directions) or len(tables) < 2 or any(one != units[0] for one in units):
        return []
    unseen = {name: study.directions[name].unseen for name in tables}
    values = {}
    for variant in next(iter(tables.values())):
        pairs = {name: (table.get(reference, {}), table.get(variant, {})) for name, table in tables.items()}
        seeds, parts = over_directions(pairs, units[0], unseen)
        if seeds:
            values[variant] = difference(parts)
    if not set(values) - {reference}:
        return []
    levels = holm({name: value.p_value() for name, value in values.items() if name != reference})
    lines = [
        "",
        "## Final: all directions",
        "",
        f"Mean over directions of the AUC of the unseen forgeries, and {reference} minus each other variant, paired by "
        "seed and image.",
        "",
        "| variant | seeds | mean unseen | difference | 95% interval | excludes 0 if Holm rejects | p |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, value in values.items():
        against = "- | - | - | - |" if name == reference else cells(value, levels.get(name))
        lines.append(f"| {name} | {len(value.auc_b)} | {_mean(value.auc_b)} | {against}")
    return lines


def _forest(found: Mapping[str, Difference], levels: Mapping[str, float], path: Path, title: str) -> None:
    """One row a comparison: the mean, its interval at Holm's level, and a small dot for each seed."""
    figure, ((axes,),) = new_figure(size=(7, 1.3 + 0.4 * len(found)))
    for row, (other, value) in enumerate(found.items()):
        color = METHOD_COLORS.get(other, "tab:purple")
        interval = value.interval(levels[other]) if other in levels else None
        if interval is not None:
            axes.plot(interval, [row, row], color=color, linewidth=2, alpha=0.6)
        axes.plot(value.per_seed, np.full(len(value.per_seed), row + 0.22), ".", color=color, markersize=4)
        axes.plot(value.mean, row, "o", color=color)
    axes.axvline(0, color="grey", linestyle=":", linewidth=1)
    axes.set_yticks(range(len(found)), list(found))
    axes.set(ylim=(len(found) - 0.4, -0.6), title=title)
    axes.set_xlabel("difference of AUC; lines exclude 0 if Holm's test rejects; small dots: seeds")
    axes.grid(axis="x", alpha=0.3)
    save_figure(figure, path)


def _grid(study: Study, results: Sequence[dict[str, Any]], folder: Path) -> list[str]:
    """The settings that were tried, with their source validation; the best of each variant is marked."""
    tried = [r for r in results if r["stage"] == "grid" and r["variant"] in study.variants]
    if not tried:
        return []
    lines = [
        "",
        "## Grid: settings, chosen on source validation",
        "",
        f"Trained on {study.grid['direction']}, seed {study.grid['seed']}; nothing was tested. AUC by tile.",
        "",
        "| variant | lr | s_lr | head_lr | validation AUC | \\|\\|dW\\|\\| / \\|\\|W\\|\\| (mean) |",
        "|---|---|---|---|---|---|",
    ]
    planned, chosen = {run.key for run in runs_of(study, "grid", folder)}, {}
    for variant in study.grid["settings"]:
        try:
            chosen[variant] = make_run(
                study, study.grid["direction"], variant, study.grid["seed"], {}, chosen=folder
            ).key
        except GridIncomplete:
            continue
    for result in sorted(tried, key=lambda r: (list(study.variants).index(r["variant"]), -r["val_auc"])):
        method, drift = result["settings"]["method"], result.get("drift", {}).get("mean")
        mark = " **chosen**" if result["key"] in chosen.values() else ""
        mark += "" if result["key"] in planned else " (given up: not in the grid)"
        rates = [method[name] for name in ("lr", "s_lr", "head_lr")]
        lines.append(
            f"| {result['variant']} | {' | '.join('-' if rate is None else f'{rate:g}' for rate in rates)} | "
            f"{result['val_auc']:.3f}{mark} | {'-' if drift is None else f'{drift:.3f}'} |"
        )
    return lines
