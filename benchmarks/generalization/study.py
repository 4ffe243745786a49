"""Studies of how well methods detect forgeries that they were not trained on.

    python benchmarks/generalization/study.py run ffhq-gan --data DATA           # all stages; goes on where it stopped
    python benchmarks/generalization/study.py run ffhq-gan --data DATA --only stylegan2--lora --repeat AGAIN
    python benchmarks/generalization/study.py report
    python benchmarks/generalization/study.py compare families/lora families/probe --directions no-blend-warp
    python benchmarks/generalization/study.py cost ffhq-gan                     # time and memory of a training step

A study is a file `studies/<name>.yaml`. Each run writes one file `results/<study>/<key>.json` with its settings, its
numbers, and the score of every test image. Runs that have a file are not computed again. Runs are executed side by
side with one thread each: on a small model two of them are about 1.4 times as fast as one with two threads. Images
are read into memory only; nothing of them is written. `--repeat` computes runs again that have a file, into a folder
of their own, and prints both outcomes.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from compare import SIDES, compare
from cost import cost
from masm_detect.config import ConfigError
from masm_detect.results import ResultError, read_json, write_json
from plan import STAGES, Run, read_study, result_file, runs_of, stored_result
from report import report
from runner import execute, made_by, one_thread
from study_data import DataMissing

from masm_ext.progress import Progress


def main() -> int:
    """The program; returns its exit code."""
    options = _parser().parse_args()
    try:
        if options.command == "report":
            return report(options.studies, options.results)
        if options.command == "compare":
            print(compare(options.a, options.b, options.results, side=options.side, directions=options.directions))
            return 0
        if options.command == "cost":
            return cost(read_study(options.study), options.results, options.rounds)
        return run_study(options)
    except (ConfigError, DataMissing, ResultError) as error:
        print(f"study.py: {error}", file=sys.stderr)
        return 2


def run_study(options: argparse.Namespace) -> int:
    """Execute what is missing; 1 if a run failed, 3 if `--minutes` were over before all runs had started."""
    study = read_study(options.study)
    options.out = options.repeat or options.results
    failed: list[str] = []
    left = 0
    deadline = None if options.minutes is None else time.monotonic() + 60 * options.minutes
    for stage in options.stages or STAGES:
        waiting: set[str] = set()
        runs = [run for run in runs_of(study, stage, options.results, waiting) if options.only in run.key]
        missing = [run for run in runs if stored_result(run, options.out, stage != "grid") is None]
        print(f"{study.name}, stage {stage}: {len(runs)} runs, {len(missing)} of them missing", flush=True)
        if waiting:
            print(f"  their grid is not complete: {', '.join(sorted(waiting))}", flush=True)
        if missing and not options.list:
            left = _run_all(missing, stage, options, deadline, failed)
            if left:
                print(f"stopped after {options.minutes:g} minutes with {left} runs to go", file=sys.stderr)
                break
        for run in missing if options.list else ():
            print(f"  {run.key}")
    if failed:
        print(f"{len(failed)} runs failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 3 if left else 0


def _run_all(
    runs: list[Run], stage: str, options: argparse.Namespace, deadline: float | None, failed: list[str]
) -> int:
    """Execute the runs and save their results; adds the keys of those that fail to `failed`. Returns how many were not
    started before the deadline.
    """
    running, queue = {}, list(runs)
    made = made_by()
    # Forking a process whose torch already has threads may hang: start clean ones.
    pool = ProcessPoolExecutor(options.workers, mp_context=get_context("spawn"), initializer=one_thread)
    with pool, Progress(total=len(runs), desc=stage, unit="run") as bar:
        while queue or running:
            while queue and len(running) < options.workers and (deadline is None or time.monotonic() < deadline):
                run = queue.pop(0)
                running[pool.submit(execute, run, options.data, stage != "grid")] = run
            if not running:
                return len(queue)
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                run = running.pop(future)
                bar.update()
                if isinstance(future.exception(), DataMissing):
                    raise future.exception()
                if isinstance(future.exception(), BrokenProcessPool):
                    raise ConfigError(f"{run.key}: its process was killed; start the program again to go on")
                if future.exception() is not None:
                    failed.append(run.key)
                    Progress.write(f"FAILED {run.key}: {future.exception()!r}")
                    continue
                result, units = future.result()
                _save(run, {"key": run.key, "stage": stage, **result, "provenance": made}, units, options.out)
                Progress.write(f"{run.key}: {_outcome(result)} in {result['seconds']:.0f} s")
                if options.repeat and (stored := stored_result(run, options.results)):
                    Progress.write(f"  stored: {_outcome(stored)}")
                    if result["learned_sha256"] != stored.get("learned_sha256", result["learned_sha256"]):
                        Progress.write("  it learned from other images: was the data set changed?")
    return 0


def _outcome(result: dict[str, Any]) -> str:
    aucs = "".join(f", {name} {auc:.3f}" for name, auc in result.get("auc", {}).items())
    return f"val {result.get('val_auc', 0):.3f}{aucs}"


def _save(run: Run, result: dict, units: dict, results: Path) -> None:
    """Write the result of a run, and the units of its direction beside it, which are the same for all its runs."""
    file = result_file(run, results)
    record = file.parent / f"units-{run.direction}-{run.sampling.test_tiles}.json"
    if record.is_file() and read_json(record) != units:
        raise ConfigError(
            f"{run.key}: the test images are not those of {record}: was the data set changed? Move that folder away"
        )
    write_json(record, units)
    write_json(file, result)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="execute the runs of a study that have no result yet")
    run.add_argument("study", help="name of a file in studies/, without .yaml")
    run.add_argument("--data", type=Path, required=True, help="folder of the data sets, see study_data.py")
    run.add_argument("--stages", nargs="+", choices=STAGES, help="default: all")
    run.add_argument("--only", default="", help="only runs whose key contains this")
    run.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    run.add_argument("--minutes", type=float, help="start no further run after so many minutes")
    run.add_argument("--repeat", type=Path, help="compute stored runs again, into this folder, and print both outcomes")
    run.add_argument("--list", action="store_true", help="print the keys of the missing runs, and run nothing")
    make = commands.add_parser("report", help="tables and figures from the results")
    make.add_argument("studies", nargs="*", help="default: every study that has results")
    versus = commands.add_parser("compare", help="the difference of any two variants, from their stored scores")
    versus.add_argument("a", help="study/variant")
    versus.add_argument("b", help="study/variant, of another study only if it tests the same images")
    versus.add_argument("--side", choices=SIDES, default="unseen", help="which forgeries (default: unseen)")
    versus.add_argument("--directions", nargs="+", default=(), help="default: all")
    timed = commands.add_parser("cost", help="time and memory of a step of each variant, on a quiet machine")
    timed.add_argument("study", help="name of a file in studies/, without .yaml")
    timed.add_argument("--rounds", type=int, default=5, help="processes for each variant")
    for command in (run, make, versus, timed):
        command.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    return parser


if __name__ == "__main__":
    sys.exit(main())
