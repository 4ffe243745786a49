"""What a first, short time on a machine with an NVIDIA GPU should answer, the most valuable stage first.

    python benchmarks/gpu_proof.py --out proof               # 14 minutes: build, tests, times, sanitizers, strategies
    python benchmarks/gpu_proof.py --out proof --rehearse    # without a GPU: every stage on the smallest input it has
    python benchmarks/gpu_proof.py --out proof --stages test layer

Each stage is a program with a time limit of its own; `proof/log.txt` holds what they print. After each stage
`proof/summary.json` is written anew, so that nothing is lost if the machine is taken away. A stage that fails stops no
other one, except the build. How to read the numbers: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Numbers first, then whole models: if the time is short, the last ones are missing.
TESTS = [f"tests/gpu/test_{name}_on_gpu.py" for name in ("ops", "masked_adamw", "optimizer", "models", "training")]
#: A stage is not started with less than this left.
LEAST_SECONDS = 20


@dataclass(frozen=True)
class Stage:
    """A program, its time limit in seconds, and what runs in its place in a rehearsal."""

    name: str
    limit: int
    command: list[str]
    rehearsal: list[str]
    needs: str | None = None  # a program that must be on PATH


@dataclass
class Outcome:
    """How a stage ended: "passed", "failed", "out of time", "missing" (its program) or "not started"."""

    stage: str
    outcome: str
    seconds: float = 0.0
    last_line: str = ""


def stages(out: Path, architecture: str) -> list[Stage]:
    """All stages, in their order. `architecture`: of the GPU, as CMake names it."""
    python = sys.executable
    install = [python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "."]
    found = [
        Stage(
            "build",
            180,
            [*install, "--config-settings", f"cmake.define.MASM_CUDA_ARCHS={architecture}"],
            [python, "-c", "import masm_ext"],
        ),
        Stage("environment", 30, *2 * ([python, "-m", "masm_detect", "env"],)),
        Stage(
            "test",
            180,
            [python, "-m", "pytest", "-q", "-m", "gpu", *TESTS],
            [python, "-m", "pytest", "-q", "-m", "gpu", "--collect-only", *TESTS],
        ),
    ]
    for suite, limit in (("layer", 180), ("step", 120), ("memory", 60), ("optimizer", 60)):
        command = [python, "benchmarks/speed/run.py", "--device", "cuda", "--suite", suite, "--no-progress"]
        # the program stops by itself before its limit, and keeps every case that is done
        real = [*command, "--minutes", f"{0.8 * limit / 60:.2f}", "--out", str(out / f"{suite}.json")]
        found.append(Stage(suite, limit, real, [*command, "--dry-run"]))
    for tool in ("memcheck", "racecheck"):
        command = ["make", "gpu-sanitize", f"SANITIZERS={tool}", f"GPU_PYTHON={python}"]
        found.append(Stage(tool, 90, command, [*command, "--dry-run"], needs="compute-sanitizer"))
    tune = [python, "benchmarks/gpu_model/tune.py", "--kinds", "bfloat16"]
    found.append(Stage("tune", 240, [*tune, "--minutes", "3.2", "--out", str(out / "tune.json")], [*tune, "--dry-run"]))
    return found


def main() -> int:
    """The program; returns 1 if a stage did not pass."""
    options = _parser().parse_args()
    architecture = _architecture()
    if architecture is None and not options.rehearse:
        print("gpu_proof.py: nvidia-smi finds no GPU here; --rehearse runs without one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    every = stages(options.out.resolve(), architecture or "90a-real")
    if unknown := sorted(set(options.stages) - {stage.name for stage in every}):
        names = ", ".join(stage.name for stage in every)
        print(f"gpu_proof.py: no stage {', '.join(unknown)}; there are {names}", file=sys.stderr)
        return 2
    outcomes: list[Outcome] = []
    for stage in every:
        if options.stages and stage.name not in options.stages:
            continue
        left = int(deadline - time.monotonic())
        if left < LEAST_SECONDS or (outcomes and outcomes[0].stage == "build" and outcomes[0].outcome != "passed"):
            outcome = Outcome(stage.name, "not started")
        else:
            command = stage.rehearsal if options.rehearse else stage.command
            outcome = run(stage, command, min(stage.limit, left), options.out / "log.txt")
        outcomes.append(outcome)
        _write(options.out / "summary.json", outcomes, options.rehearse)
        print(f"{outcome.stage:12} {outcome.outcome:12} {outcome.seconds:6.0f} s  {outcome.last_line}", flush=True)
    return 0 if all(outcome.outcome == "passed" for outcome in outcomes) else 1


def run(stage: Stage, command: list[str], limit: float, log: Path) -> Outcome:
    """Execute a stage; its output is added to `log`. After `limit` seconds it and its children are killed."""
    with log.open("a", encoding="utf-8") as file:
        print(f"\n=== {stage.name}: {' '.join(command)}", file=file, flush=True)
        start = file.tell()
        if stage.needs and shutil.which(stage.needs) is None:
            return Outcome(stage.name, "missing", last_line=f"{stage.needs} is not on PATH")
        began = time.monotonic()
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            ended = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - began
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    return Outcome(stage.name, ended, round(seconds, 1), lines[-1][:200] if lines else "")


def _architecture() -> str | None:
    """The GPU's architecture as CMake names it, such as 90a-real; None without a GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return None
    if not found:
        return None
    number = found[0].replace(".", "")
    # 9.0 and newer: with "a" come the instructions of that one architecture
    return f"{number}a-real" if int(number) >= 90 else f"{number}-real"


def _write(path: Path, outcomes: list[Outcome], rehearsed: bool) -> None:
    temporary = path.with_name(path.name + ".tmp")
    record = {"rehearsal": rehearsed, "stages": [asdict(outcome) for outcome in outcomes]}
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=14, help="of all stages together (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", default=(), help="only these (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU; nothing is measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
