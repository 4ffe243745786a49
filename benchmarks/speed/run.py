"""Measures masm_ext against its baseline and its peers, side by side in one run, and writes the numbers as JSON.

    python benchmarks/speed/run.py --suite layer                          # one suite; results/layer-cpu.json
    python benchmarks/speed/run.py --suite all --quick --out quick.json   # small counts; a few minutes
    python benchmarks/speed/run.py --suite all --dry-run                  # list, build and check; time nothing
    python benchmarks/speed/run.py --suite all --device cuda              # sizes of a GPU; stops after 8 minutes
    python benchmarks/speed/run.py --compare before.json after.json       # what moved by more than noise

A case is written as soon as it is there; `--resume` goes on where an interrupted run with the same settings stopped.
How the numbers are made and read: benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench import Outcome
from cases import DTYPES, MODELS, SUITES, Case, Defaults, Options
from compare import compare_files
from machine import ceilings, describe
from masm_detect.results import ResultError, write_json
from providers import PROVIDERS
from store import open_results
from suites import group
from suites.optimizer import CONTENDERS
from training import PROGRAMS

from masm_ext.progress import Progress

RESULTS = Path(__file__).resolve().parent / "results"


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a provider was refused or failed, 2 for options that cannot be served, 130 if
    interrupted."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        if asked.compare:
            print(compare_files(*asked.compare))
            return 0
        if asked.suite is None:
            parser.error("give --suite, or --compare A.json B.json")
        if asked.quick:
            asked.batch, asked.seconds = asked.batch or 4, asked.seconds or min(2.0, _defaults(asked).seconds)
        return run(asked)
    except (ResultError, KeyboardInterrupt) as error:
        return report_end(error)


def report_end(error: ResultError | KeyboardInterrupt) -> int:
    """Print why a command ended early; returns its exit code."""
    if isinstance(error, KeyboardInterrupt):
        print("interrupted; --resume goes on with what was written", file=sys.stderr)
        return 130
    print(error, file=sys.stderr)
    return 2


def run(asked: argparse.Namespace) -> int:
    """Measure every case that is not there yet."""
    here = asked.device == "cpu" or torch.cuda.is_available()
    suites = {
        name: importlib.import_module(f"suites.{name}") for name in (SUITES if asked.suite == "all" else [asked.suite])
    }
    if asked.threads is not None:
        torch.set_num_threads(asked.threads)
    options = _options(asked)
    todo = [case for suite in suites.values() for case in suite.cases(options) if asked.only in case.key]
    if not todo:
        print(f"no case of --suite {asked.suite} has {asked.only!r} in its name; --dry-run lists them", file=sys.stderr)
        return 2
    if not here and not asked.dry_run:
        print(f"--device {asked.device}, but this torch {torch.__version__} sees no CUDA device", file=sys.stderr)
        return 2
    if asked.dry_run:
        _list(suites, todo, options)
    if not here:
        print("no GPU: nothing was built")
        return 0
    with tempfile.TemporaryDirectory(prefix="masm-benchmark-") as cache:
        options = dataclasses.replace(options, cache=Path(cache))
        if asked.dry_run:
            return _dry_run(suites, todo, options)
        return _measure(suites, todo, options, asked)


def _list(suites: dict[str, Any], todo: list[Case], options: Options) -> None:
    for case in todo:
        names = [name for name in suites[case.suite].names(options, case) if name != case.baseline]
        print(f"{case.key}: about {case.estimate:.0f} s; over {case.baseline}: {', '.join(names)}")
    minutes = sum(case.estimate for case in todo) / 60
    print(f"{len(todo)} cases, about {minutes:.0f} minutes on {options.device}, a guess")


def _dry_run(suites: dict[str, Any], todo: list[Case], options: Options) -> int:
    unsound = 0
    for case in todo:
        outcome: Outcome = suites[case.suite].measure(case, options)
        unsound += not outcome.sound
        print(f"{case.key}: {len(outcome.errors)} checked")
        for line in _notes(outcome):
            print(f"  {line}")
    print(f"{len(todo)} cases, {unsound} with a provider that is wrong or fails; nothing was timed")
    return 1 if unsound else 0


def _measure(suites: dict[str, Any], todo: list[Case], options: Options, asked: argparse.Namespace) -> int:
    out = asked.out or RESULTS / f"{asked.suite}-{asked.device.partition(':')[0]}.json"
    minutes = asked.minutes or options.defaults.minutes
    measure = lambda case: suites[case.suite].measure(case, options)  # noqa: E731
    return measure_all(todo, measure, out, settings_of(asked, options), options, asked.resume, minutes)


def measure_all(
    todo: list[Case],
    measure: Callable[[Case], Outcome],
    out: Path,
    settings: dict[str, Any],
    options: Options,
    resume: bool,
    minutes: float | None,
) -> int:
    """Measure what `out` does not hold yet and write it there, case by case; returns the exit code.

    With `minutes` a case is not started that would, by its estimate, end later; at least one is. --resume goes on.
    """
    results = open_results(out, settings, resume)
    done = {key for key, case in results["cases"].items() if not case["refused"] and not case["failed"]}
    todo = [case for case in todo if case.key not in done]
    device = torch.device(options.device)
    if not todo:
        print(f"{out} holds every case already")
        return 0
    begin, launch = time.perf_counter(), len(results["launches"])
    dtypes = tuple(dict.fromkeys(case.dtype for case in todo))
    top = ceilings(device, dtypes, min(3.0, options.seconds), small=options.quick)
    results["launches"].append(describe(device) | {"ceilings": top})
    unsound: list[str] = []
    left: list[str] = []
    with Progress(todo, unit="case", disable=not options.progress) as bar:
        for case in bar:
            bar.set_description(case.key)
            late = minutes is not None and time.perf_counter() - begin + case.estimate > 60 * minutes
            if late and case is not todo[0]:
                left.append(case.key)
                continue
            outcome = measure(case)
            results["cases"][case.key] = outcome.to_dict() | {"launch": launch}
            write_json(out, results)
            for line in [_summary(outcome), *_notes(outcome)]:
                Progress.write(f"{case.key}: {line}")
            if not outcome.sound:
                unsound.append(case.key)
    if left:
        print(f"not measured within {minutes:g} minutes; --resume goes on with {', '.join(left)}", file=sys.stderr)
    if unsound:
        print(f"a provider is wrong or fails in {', '.join(unsound)}; see {out}", file=sys.stderr)
    return 1 if unsound else 0


def settings_of(asked: argparse.Namespace, options: Options) -> dict[str, Any]:
    """What must be equal for two runs to go into one file; the suites need not be."""
    names = ("device", "model", "batch", "seconds", "quick", "threads")
    settings = {name: getattr(options, name) for name in names}
    return {**settings, "dtypes": list(options.dtypes), "providers": asked.providers}


def _options(asked: argparse.Namespace) -> Options:
    return Options(
        device=asked.device,
        threads=asked.threads or torch.get_num_threads(),
        dtypes=tuple(asked.dtypes or DTYPES),
        model_dtypes=tuple(asked.dtypes or ()),
        providers=None if asked.providers is None else tuple(asked.providers),
        model=asked.model or "",
        batch=asked.batch or 0,
        seconds=asked.seconds or 0.0,
        quick=asked.quick,
        dry_run=asked.dry_run,
        progress=sys.stderr.isatty() if asked.progress is None else asked.progress,
    )


def _summary(outcome: Outcome) -> str:
    parts = []
    for name, measure in outcome.measures.items():
        baseline = measure["baseline"]
        ratios = {p: e["ratio"]["median"] for p, e in measure["providers"].items() if "ratio" in e and p != baseline}
        if ratios:
            over = f"{name.removesuffix(f' over {baseline}')} over {baseline}"
            if baseline == "eager-loop" and outcome.case.values["masked"] == 1:
                over += " (which does nothing here: every block is masked)"
            parts.append(f"{over}: " + " ".join(f"{p} {r:.2f}" for p, r in ratios.items()))
    return "; ".join(parts) or "no ratio"


def _notes(outcome: Outcome) -> list[str]:
    """Providers without numbers, one line a reason."""
    kinds = (("REFUSED", outcome.refused), ("FAILED", outcome.failed), ("not here", outcome.unavailable))
    lines = []
    for kind, notes in kinds:
        names: dict[str, list[str]] = {}
        for name, reason in notes.items():
            names.setdefault(reason, []).append(name)
        lines += [f"{kind}: {', '.join(who)}: {reason}" for reason, who in names.items()]
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--suite", choices=[*SUITES, "all"])
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name, e.g. 1024x1024/R16")
    parser.add_argument("--device", default="cpu", type=_device, help="cpu or cuda (cuda:1)")
    parser.add_argument(
        "--providers", type=_list_of(known_providers()), metavar="A,B", help="default: all; the baseline always runs"
    )
    parser.add_argument("--dtypes", type=_list_of(DTYPES), metavar="A,B", help=", ".join(DTYPES))
    parser.add_argument("--threads", type=int, help="threads of torch (default: its own choice)")
    parser.add_argument(
        "--model", choices=list(MODELS), help="for step, memory and losses (default vit-s; vit-l on cuda)"
    )
    parser.add_argument("--batch", type=int, help="images of a step (default 16; 32 on cuda; 4 with --quick)")
    parser.add_argument(
        "--seconds", type=float, help="budget of a comparison (default 12; 2 with --quick; 1.5 on cuda)"
    )
    parser.add_argument("--minutes", type=float, help="start no case that would end later (default: none; 8 on cuda)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and small counts: to see that it works")
    parser.add_argument("--dry-run", action="store_true", help="build and check everything on tiny shapes; no timing")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/speed/results/SUITE-DEVICE.json)")
    parser.add_argument("--resume", action="store_true", help="go on with the result file")
    parser.add_argument(
        "--progress", action=argparse.BooleanOptionalAction, help="progress bars (default: on a terminal)"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="compare two result files")
    return parser


def known_providers() -> list[str]:
    """Every name that a suite compares under."""
    return list(dict.fromkeys([*PROVIDERS, *PROGRAMS, *group.CONTENDERS, *CONTENDERS, "stacked"]))


def _defaults(asked: argparse.Namespace) -> Defaults:
    return Options(device=asked.device).defaults


def _device(text: str) -> str:
    if text == "cpu" or text.partition(":")[0] == "cuda":
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")


def _list_of(known):
    def parse(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        wrong = [name for name in names if known is not None and name not in known]
        if wrong or not names:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong) or 'nothing'}: give some of {', '.join(known or [])}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
