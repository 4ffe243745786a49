"""Summarises the studies from `results/*.json`: per study Markdown tables, and a plot for each direction.

    python benchmarks/generalization/report.py [--work WORK]

The tables give the mean and standard deviation over seeds. With `--work` (the work folder of `run.py`, which holds the
scores) they also give the 95% interval of the mean, by a jackknife over the groups of the test set (videos, or images)
for all seeds together. The intervals are also written into the results, so that later reports do not need the scores.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import numpy as np
from masm_detect.evaluation.intervals import MIN_CLUSTERS, leave_one_out, logit_interval
from masm_detect.report.plots import plot_auc_dots
from masm_detect.results import read_json, write_json, write_text
from studies import STUDIES, Study

#: How the intervals of a result file were made.
POOLED = "jackknife over groups"


def main() -> int:
    """Write `results/<study>.md` and `results/<study>.png` for every study that has results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--work", type=Path, help="the work folder of run.py, for the pooled intervals")
    options = parser.parse_args()
    for study in STUDIES.values():
        file = options.results / f"{study.name}.json"
        if not file.is_file():
            print(f"no results of {study.name} in {options.results}")
            continue
        results = read_json(file)
        if options.work is not None:
            results["pooled"] = pooled_intervals(study, results, options.work / "scores" / study.name)
            results["pooled_runs"] = sorted(results["runs"])
            results["pooled_method"] = POOLED
            write_json(file, results)
        elif results.get("pooled_method") != POOLED or results.get("pooled_runs") != sorted(results["runs"]):
            results.pop("pooled", None)  # of other runs than those there are now, or made in another way
        text = summary(study, results)
        write_text(options.results / f"{study.name}.md", text)
        for direction in study.directions:
            plot(study, results, direction, options.results / f"{study.name}-{direction}.png")
        print(text)
    return 0


def by_method(study: Study, results: dict, direction: str) -> dict[str, dict[str, list[float]]]:
    """method -> forgery -> the headline metric of each seed, in order of the seeds; "mean seen" and "mean
    unseen" where there are several.
    """
    table: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    runs = [run for run in results["runs"].values() if run["direction"] == direction]
    for run in sorted(runs, key=lambda run: run["seed"]):
        (entry,) = run["test"].values()
        values = {name: numbers[study.headline] for name, numbers in entry["methods"].items()}
        for name, value in values.items():
            table[run["method"]][name].append(value)
        for side, names in (("seen", study.directions[direction]), ("unseen", study.unseen(direction))):
            if len(names) > 1:
                table[run["method"]][f"mean {side}"].append(float(np.mean([values[name] for name in names])))
    return table


def summary(study: Study, results: dict) -> str:
    """The Markdown report of one study."""
    made = results["launches"][-1]
    lines = [
        f"# {study.name}",
        "",
        f"{'Image' if study.headline == 'video_auc' else 'Frame'} AUC: mean +- standard deviation over seeds"
        + _about_intervals(study, results),
        f"{results['settings']['backbone']}, {study.image_size} px, {results['settings']['optim']['epochs']} epochs; "
        f"torch {made['packages'].get('torch')}, {made['device']['name']}. {study.caution}",
    ]
    for direction, seen in study.directions.items():
        unseen = study.unseen(direction)
        columns = [*seen, *unseen]
        columns += [f"mean {side}" for side, names in (("seen", seen), ("unseen", unseen)) if len(names) > 1]
        titles = [f"{name} (unseen)" if name in unseen else name for name in columns]
        lines += ["", f"## Trained on {', '.join(seen)}", "", f"| method | seeds | {' | '.join(titles)} |"]
        lines += ["|---" * (len(columns) + 2) + "|"]
        pooled = results.get("pooled", {}).get(direction, {})
        for method, values in by_method(study, results, direction).items():
            cells = [_cell(values[name], pooled.get(method, {}).get(name)) for name in columns]
            lines.append(f"| {method} | {len(values[columns[0]])} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _about_intervals(study: Study, results: dict) -> str:
    if "pooled" not in results:
        return "."
    if results["pooled"]:
        return f", [95% interval of the mean, clustered by {study.cluster}]."
    return f". No intervals: fewer than {MIN_CLUSTERS} {study.cluster}s a class carry none."


def plot(study: Study, results: dict, direction: str, path: Path) -> None:
    """Dots of every method, seen and unseen forgeries; lines: the pooled interval, else one deviation over seeds."""
    pooled = results.get("pooled", {}).get(direction, {})
    table = {}
    for method, values in by_method(study, results, direction).items():
        table[method] = {}
        for name, numbers in values.items():
            mean, deviation = float(np.mean(numbers)), _deviation(numbers)
            deviations = (mean - deviation, mean + deviation)
            # one kind of line a figure, as its caption says
            low, high = (pooled.get(method, {}).get(name) or (None, None)) if pooled else deviations
            table[method][name] = (mean, low, high)
    if table:
        span = "95% interval of the mean over seeds" if pooled else "one standard deviation over seeds, each way"
        title = f"{study.name}: trained on {direction}"
        plot_auc_dots(table, path, title=title, interval=span, unseen=study.unseen(direction))


def pooled_intervals(study: Study, results: dict, scores: Path) -> dict:
    """direction -> method -> forgery -> [low, high] of the mean AUC over seeds, by the jackknife over the groups of the
    test set.
    """
    pooled: dict = defaultdict(lambda: defaultdict(dict))
    files: dict[tuple[str, str], list[dict]] = defaultdict(list)
    for key, run in results["runs"].items():
        file = scores / f"{key.replace('/', '-')}.json"
        if not file.is_file():
            raise SystemExit(f"the scores of {key} are not in {scores}: intervals need those of every run")
        files[run["direction"], run["method"]].append(_units(study, read_json(file)))
    for (direction, method), seeds in files.items():
        seen, unseen = study.directions[direction], study.unseen(direction)
        rows = {name: [name] for name in (*seen, *unseen)} | {"mean seen": seen, "mean unseen": unseen}
        for name, forgeries in rows.items():
            if forgeries and (interval := _interval_of_mean(seeds, forgeries)) is not None:
                pooled[direction][method][name] = interval
    return {direction: dict(methods) for direction, methods in pooled.items()}


def _units(study: Study, rows: dict) -> dict[str, np.ndarray]:
    """Label, method, group and score of what is scored: frames, or videos (images of tiles) by their mean score."""
    arrays = {name: np.asarray(rows[name]) for name in ("group", "method", "video", "label", "score")}
    if study.headline != "video_auc":
        return arrays
    videos, first, index = np.unique(arrays["video"], return_index=True, return_inverse=True)
    mean = np.bincount(index, arrays["score"]) / np.bincount(index)
    return {name: arrays[name][first] for name in ("group", "method", "label")} | {"score": mean, "video": videos}


def _interval_of_mean(seeds: list[dict[str, np.ndarray]], forgeries: Sequence[str]) -> list[float] | None:
    """95% interval of the mean AUC over seeds and forgeries, each against all real units; None with too few groups.

    Seeds are tested on one set: leaving a group out leaves it out of all of them.
    """
    labels, groups, methods = (seeds[0][name] for name in ("label", "group", "method"))
    used = (labels == 0) | np.isin(methods, list(forgeries))
    names, place = np.unique(groups[used], return_inverse=True)
    place_of = np.full(len(labels), -1)
    place_of[used] = place
    aucs, share = [], np.zeros(len(names))
    for forgery in forgeries:
        keep = (labels == 0) | (methods == forgery)
        kept = np.unique(place_of[keep])
        for seed in seeds:
            values = leave_one_out(groups[keep], labels[keep], seed["score"][keep])
            if values is None:
                return None
            aucs.append(values.auc)
            share += values.whole  # for a group without a unit of this forgery
            share[kept] += values.share - values.whole
    fakes, reals = (np.bincount(place, weights=labels[used] == label, minlength=len(names)) > 0 for label in (1, 0))
    return logit_interval(float(np.mean(aucs)), share / len(aucs), np.where(~fakes, 0, np.where(~reals, 1, 2)))


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _cell(values: list[float], interval: list[float] | None) -> str:
    if not values:
        return "-"
    text = f"{np.mean(values):.3f} +- {_deviation(values):.3f}"
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
