"""Summary of the studies from `results/*.json`: a Markdown table and a plot each.

    python benchmarks/generalization/report.py [--work WORK]

Mean and standard deviation over seeds. With `--work` (where `run.py` left the scores), also the 95% interval of that
mean, by the jackknife over the clusters of the test set (videos, or images) for all seeds together; it is
then written into the results, so that later reports have it without the scores.
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
            write_json(file, results)
        elif results.get("pooled_runs") != sorted(results["runs"]):
            results.pop("pooled", None)  # of other runs than those there are now
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
            low, high = pooled.get(method, {}).get(name) or (mean - deviation, mean + deviation)
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
    names, place = np.unique(groups, return_inverse=True)
    # The mean without each group: what a group that has no unit of a forgery leaves as it is keeps its value.
    without = np.zeros(len(names))
    aucs = []
    fakes, reals = np.zeros(len(names), dtype=bool), np.zeros(len(names), dtype=bool)
    reals[place[labels == 0]] = True
    for forgery in forgeries:
        keep = (labels == 0) | (methods == forgery)
        fakes[place[keep & (labels == 1)]] = True
        kept = np.unique(place[keep])
        for seed in seeds:
            values = leave_one_out(groups[keep], labels[keep], seed["score"][keep])
            if values is None:
                return None
            aucs.append(values.auc)
            without += values.auc
            without[kept] += values.without - values.auc
    mean = float(np.mean(aucs))
    share = np.clip(without / len(aucs), 1e-6, 1 - 1e-6)
    return logit_interval(mean, np.log(share / (1 - share)), np.where(~fakes, 0, np.where(~reals, 1, 2)))


def _deviation(values: list[float]) -> float:
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def _cell(values: list[float], interval: list[float] | None) -> str:
    if not values:
        return "-"
    text = f"{np.mean(values):.3f} +- {_deviation(values):.3f}"
    return text if interval is None else f"{text} [{interval[0]:.3f}, {interval[1]:.3f}]"


if __name__ == "__main__":
    sys.exit(main())
