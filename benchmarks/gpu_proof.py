"""Builds, tests and measures on an NVIDIA GPU in 14 minutes, the most valuable stage first.

    python benchmarks/gpu_proof.py --out proof               # 14 minutes: build, tests, times, sanitizers, strategies
    python benchmarks/gpu_proof.py --out proof --rehearse    # without a GPU: every stage, nothing is built or measured
    python benchmarks/gpu_proof.py --out proof --stages test layer

Each stage is a program with a time limit of its own; `proof/log.txt` holds what they print. After each stage
`proof/summary.json` is written anew, so that nothing is lost if the machine is taken away. If the build fails, or if
torch or the CUDA library does not see the GPU, the program ends. After any other failure the next stage runs. How to
read the numbers: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
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
#: Prints what was built.
SHOW = "import json, torch; from masm_ext import build_info; built = build_info(); print(json.dumps(built, indent=1))"
#: Fails where later stages would silently run without the GPU or the CUDA library.
CHECK = f"{SHOW}; assert torch.cuda.is_available(), 'torch sees no GPU'; "
CHECK += "assert built['libraries']['libmasm_cuda'] == 'loaded', built['libraries']; "
CHECK += "print(torch.cuda.get_device_name(), torch.__version__)"


@dataclass(frozen=True)
class Stage:
    """A program of the proof.

    Attributes:
        limit: seconds after which it is killed
        rehearsal: what runs in its place in a rehearsal
        timed: it takes --minutes, and stops by itself before its limit
        needs: a program that must be on PATH
        required: nothing runs after its failure
    """

    name: str
    limit: int
    command: list[str]
    rehearsal: list[str]
    timed: bool = False
    needs: str | None = None
    required: bool = False


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
    install = [python, "-m", "pip", "install", "--no-index", "--disable-pip-version-check", "--no-deps"]
    install += ["--no-build-isolation", "."]
    for setting in ("MASM_CUDA=ON", f"MASM_CUDA_ARCHS={architecture}"):
        install += ["--config-settings", f"cmake.define.{setting}"]
    test = [python, "-m", "pytest", "-q", "-rs", "-m", "gpu", *TESTS]
    found = [
        Stage("build", 150, install, [python, "-m", "pip", "--version"], required=True),
        Stage("environment", 30, [python, "-c", CHECK], [python, "-c", SHOW], required=True),
        Stage("test", 150, test, [*test, "--collect-only"]),
    ]

    def benchmark(name: str, limit: int, *program: str) -> None:
        command = [python, *program, "--out", str(out / f"{name}.json")]
        found.append(Stage(name, limit, command, [*command, "--dry-run"], timed=True))

    speed = ["benchmarks/speed/run.py", "--device", "cuda", "--no-progress", "--suite"]
    benchmark("layer", 150, *speed, "layer")
    benchmark("step", 150, *speed, "step")
    benchmark("memory", 90, *speed, "memory")
    for tool in ("memcheck", "racecheck"):
        command = ["make", "gpu-sanitize", f"SANITIZERS={tool}", f"GPU_PYTHON={python}", "SANITIZER_ARGS=--first-only"]
        found.append(Stage(tool, 90, command, [*command, "--dry-run"], needs="compute-sanitizer"))
    benchmark("tune", 240, "benchmarks/gpu_model/tune.py", "--kinds", "bfloat16")
    benchmark("optimizer", 60, *speed, "optimizer")
    return found


def main() -> int:
    """The program; returns 1 if a stage did not pass, 2 for a mistake in the call."""
    options = _parser().parse_args()
    architecture = _architecture()
    every = stages(options.out.resolve(), architecture or "90a-real")
    known = [stage.name for stage in every]
    unknown = [name for name in options.stages if name not in known]
    mistakes = {
        f"no stage {', '.join(unknown)}; there are {', '.join(known)}": unknown,
        "nvidia-smi finds no GPU here; --rehearse runs without one": architecture is None and not options.rehearse,
        f"{options.out} holds an earlier visit: give another --out": (options.out / "summary.json").exists(),
    }
    for text, made in mistakes.items():
        if made:
            print(f"gpu_proof.py: {text}", file=sys.stderr)
            return 2
    options.out.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that no child is left on the GPU
        signal.signal(number, lambda *_: sys.exit(1))
    deadline = time.monotonic() + 60 * options.minutes
    outcomes: list[Outcome] = []
    stopped = False
    for stage in every:
        if options.stages and stage.name not in options.stages:
            continue
        left = deadline - time.monotonic()
        if stopped or left < LEAST_SECONDS:
            outcome = Outcome(stage.name, "not started")
        else:
            outcome = run(stage, min(stage.limit, left), options.out / "log.txt", options.rehearse)
        stopped = stopped or (stage.required and outcome.outcome != "passed")
        outcomes.append(outcome)
        _write(options.out / "summary.json", outcomes, options.rehearse)
        print(f"{outcome.stage:12} {outcome.outcome:12} {outcome.seconds:6.0f} s  {outcome.last_line}", flush=True)
    return 0 if all(outcome.outcome == "passed" for outcome in outcomes) else 1


def run(stage: Stage, limit: float, log: Path, rehearse: bool) -> Outcome:
    """Execute a stage; its output is added to `log`. After `limit` seconds it is killed, with all that it started."""
    command = list(stage.rehearsal if rehearse else stage.command)
    if stage.timed:
        command += ["--minutes", f"{0.8 * limit / 60:.2f}"]
    if stage.needs and not rehearse and shutil.which(stage.needs) is None:
        return Outcome(stage.name, "missing", last_line=f"{stage.needs} is not on PATH")
    with log.open("a", encoding="utf-8") as file:
        print(f"\n=== {stage.name}: {' '.join(command)}", file=file, flush=True)
        start, began = file.tell(), time.monotonic()
        try:
            process = subprocess.Popen(
                command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        except OSError as error:
            return Outcome(stage.name, "failed", last_line=str(error))
        try:
            ended = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = "out of time"
        finally:
            # also after a normal end: a worker that is left would slow the next stage
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
        seconds = time.monotonic() - began
    lines = log.read_bytes()[start:].decode(errors="replace").strip().splitlines()
    return Outcome(stage.name, ended, round(seconds, 1), lines[-1][:200] if lines else "")


def _architecture() -> str | None:
    """The GPU's architecture as CMake names it, such as 90a-real; None without a GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout.split()
        number = int(found[0].replace(".", ""))
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None
    # from 9.0 on, "a" adds the instructions of that one architecture
    return f"{number}a-real" if number >= 90 else f"{number}-real"


def _write(path: Path, outcomes: list[Outcome], rehearsed: bool) -> None:
    """As `masm_detect.results.write_json`, which is not installed before the build."""
    temporary = path.with_name(path.name + ".tmp")
    record = {"rehearsal": rehearsed, "stages": [asdict(outcome) for outcome in outcomes]}
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; not that of an earlier visit")
    parser.add_argument("--minutes", type=float, default=14, help="of all stages together (default: %(default)s)")
    parser.add_argument("--stages", nargs="+", default=(), help="only these (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run without a GPU; nothing is built or measured")
    return parser


if __name__ == "__main__":
    sys.exit(main())
