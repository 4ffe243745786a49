"""Times every strategy of masm::subspace_linear on this GPU, and proposes the table that chooses among them.

    python benchmarks/gpu_model/tune.py               # gpu_model/results/tune-GPU.json; --resume continues it
    python benchmarks/gpu_model/tune.py --minutes 9   # start nothing that would end later
    python benchmarks/gpu_model/tune.py --dry-run     # lists the calls with their estimated time, checks the formula
    python benchmarks/gpu_model/tune.py --report tune-GPU.json   # the proposal again, without a GPU
    python benchmarks/gpu_model/tune.py --model h100  # the same from the cost model: modelled, not measured

It prints RULES for masm_ext/ops/strategies.py with their evidence, and what today's choices lose to the best strategy.
Every strategy is compared with float64 first; one that is wrong is not timed. Forward and backward are timed
separately, because RULES apply to each of them. The time is that of the GPU alone: it starts when the host has
launched the whole call.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from math import isinf
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "speed"))  # the timer, the shapes and the providers

import torch
import torch.nn.functional as F
from bench import Call as Timed
from bench import Clock, Outcome, interleave, statistics
from cases import Case, Options
from gpus import GPUS
from launches import seconds
from masm_detect.results import ResultError
from model import Model
from providers import TOLERANCE, check, relative_error
from rules import Row, losses, propose
from run import measure_all, report_end
from shapes import Shape
from store import load_results

from masm_ext import _library, reference
from masm_ext.ops.strategies import STRATEGIES, STREAM, choose

#: Where measurements of this folder are kept.
RESULTS = Path(__file__).resolve().parent / "results"
#: One token, a few, images of 257; attention and MLP of ViT-L; R as it is padded: 16, 64 and more than `single` serves.
TOKENS = (1, 16, 64, 257, 1028, 2056, 8224, 32896)
SHAPES = ((1024, 1024), (4096, 1024), (1024, 4096))
RANKS = (16, 64, 256)
KINDS = {"bfloat16": (torch.bfloat16, False), "float32": (torch.float32, False), "tf32": (torch.float32, True)}
#: Relative error of (y and dX, gradients) in tf32, which keeps 10 bits of what it multiplies.
TF32_TOLERANCE = (2e-3, 2e-3)
#: The calls of a case: forward in training and in inference, backward.
FORWARD, INFERENCE, BACKWARD = PARTS = ("forward", "inference", "backward")
SECONDS = 0.15


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, 1 if a strategy was refused or failed, 2 if this cannot be done, 130 if interrupted."""
    asked = _parser().parse_args(arguments)
    try:
        if asked.model:
            report(modelled(asked.model), f"modelled, {GPUS[asked.model].name}")
            return 0
        if asked.report:
            return _report_file(asked.report)
        options = Options(device=asked.device, seconds=SECONDS)
        todo = [case for case in cases() if asked.only in case.key and case.values["kind"] in asked.kinds]
        if asked.dry_run:
            return _dry_run(todo)
        if not torch.cuda.is_available():
            print("benchmarks/gpu_model/tune.py needs an NVIDIA GPU; --dry-run lists what it would do", file=sys.stderr)
            return 2
        options = Options(device=asked.device, seconds=SECONDS, progress=sys.stderr.isatty())
        gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(asked.device).lower()).strip("-")
        out = asked.out or RESULTS / f"tune-{gpu}.json"
        settings = {"device": asked.device, "seconds": SECONDS}
        code = measure_all(
            todo, lambda case: measure(case, options), out, settings, options, asked.resume, asked.minutes
        )
        _report_file(out)
        return code
    except (ResultError, KeyboardInterrupt) as error:
        return report_end(error)


def cases() -> list[Case]:
    """Kind and R outermost: what they share is compiled once."""
    out = []
    for kind in KINDS:
        for R in RANKS:
            for M in TOKENS:
                for N, D in SHAPES:
                    values = {"M": M, "N": N, "D": D, "R": R, "kind": kind}
                    # a guess: three comparisons, the gate, tiles timed
                    first = (TOKENS[0], SHAPES[0]) == (M, (N, D))  # with it the kernels of a kind and R compile
                    estimate = 3 * SECONDS + 1.5 + 30 * first
                    dtype = str(KINDS[kind][0]).removeprefix("torch.")
                    out.append(Case("tune", f"{kind}/M{M}/{N}x{D}/R{R}", dtype, "frozen", values, estimate=estimate))
    return out


def shape_of(values: dict[str, Any], learning: bool, cuda_library: bool = True) -> Shape:
    dtype, tf32 = KINDS[values["kind"]]
    sizes = (values[letter] for letter in "MNDR")
    return Shape(*sizes, dtype=dtype, tf32=tf32, learning=learning, cuda_library=cuda_library)


class Problem:
    """One layer with random numbers. x [M, D], dy [M, N]; four subspaces, nothing masked."""

    def __init__(self, shape: Shape, device: torch.device) -> None:
        M, N, D, R = shape.M, shape.N, shape.D, shape.R
        torch.manual_seed(0)

        def random(*size: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
            return torch.randn(size, device=device).to(dtype)

        self.x, self.dy, self.bias = random(M, D), random(M, N), random(N)
        self.weight = (random(N, D, dtype=torch.float32) / D**0.5).to(shape.dtype)
        self.u, self.v = random(R, N, dtype=torch.float32) / N**0.5, random(R, D, dtype=torch.float32) / D**0.5
        self.s = torch.rand(R, device=device) + 0.5
        self.mask = torch.ones(4, dtype=torch.bool, device=device)
        self.offsets = [k * R // 4 for k in range(5)]
        self.p = self.x.float() @ self.v.mT

    def run(self, part: str, strategy: str, ops: Any = torch.ops.masm) -> tuple[torch.Tensor, ...]:
        """(y, P) or (dX, du, ds, dv, no dbias)."""
        factors = (self.weight, self.u, self.s, self.v)
        if part == BACKWARD:
            needs = (True, True, True, True, False)
            arguments = (self.dy, self.x, *factors, self.p, self.mask, self.offsets, *needs)
            return ops.subspace_linear_backward(*arguments, *([strategy] if strategy else []))
        arguments = (self.x, *factors, self.bias, self.mask, self.offsets, part == FORWARD)
        return ops.subspace_linear(*arguments, *([strategy] if strategy else []))

    def frozen(self, part: str) -> torch.Tensor:
        return self.dy @ self.weight if part == BACKWARD else F.linear(self.x, self.weight, self.bias)

    def exact(self, part: str) -> tuple[torch.Tensor, ...]:
        """`run` in float64."""
        wide = object.__new__(Problem)
        for name, value in vars(self).items():
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            setattr(wide, name, value.double() if floating else value)
        wide.p = wide.x @ wide.v.mT
        return wide.run(part, "", reference)


def gate(found: Iterable[torch.Tensor], exact: Iterable[torch.Tensor], part: str, kind: str) -> dict[str, float]:
    """Relative errors by name. Raises GateError."""
    names = ("dX", "du", "ds", "dv") if part == BACKWARD else ("y", "P") if part == FORWARD else ("y",)
    errors = {name: relative_error(f, e) for name, f, e in zip(names, found, exact)}
    check(errors, *(TF32_TOLERANCE if kind == "tf32" else TOLERANCE[KINDS[kind][0]]))
    return errors


@torch.no_grad()
def measure(case: Case, options: Options) -> Outcome:
    """One measure a part, with the strategies that can serve it over the frozen product."""
    outcome, device, kind = Outcome(case), torch.device(options.device), case.values["kind"]
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if kind == "tf32" else "ieee"
    try:
        clock = Clock(device, ahead=True)
        for part in PARTS:
            shape = shape_of(case.values, part != INFERENCE, _library.CUDA_LIBRARY is not None)
            problem = Problem(shape, device)
            exact, calls = problem.exact(part), {case.baseline: Timed(lambda p=problem, part=part: p.frozen(part))}
            for strategy in STRATEGIES:
                if not shape.serves(strategy) or (part == BACKWARD and strategy == STREAM):
                    continue
                with outcome.provider(f"{part} {strategy}"):
                    found = problem.run(part, strategy)  # compiles, and times the tiles
                    outcome.errors[f"{part} {strategy}"] = gate(found, exact, part, kind)
                    calls[strategy] = Timed(lambda p=problem, part=part, strategy=strategy: p.run(part, strategy))
            del exact
            samples = interleave(
                calls,
                device,
                options.seconds,
                least=5,
                on_failure=lambda n, e, p=part: outcome.fail(f"{p} {n}", e),
                clock=clock,
            )
            outcome.add(part, statistics(samples, case.baseline))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    return outcome


def rows_of(results: dict[str, Any]) -> list[Row]:
    """What a result file says of each call."""
    out = []
    for case in results["cases"].values():
        capability = int(results["launches"][case["launch"]]["device"]["capability"].replace(".", ""))
        for part, table in case["measures"].items():
            times = {name: entry["median"] for name, entry in table["providers"].items() if name in STRATEGIES}
            forward, backward = shape_of(case["values"], part != INFERENCE, STREAM in times).calls(capability)
            if times:
                out.append((backward if part == BACKWARD else forward, times))
    return out


def modelled(gpu: str) -> list[Row]:
    """The same calls by the cost model."""
    model, out = Model(GPUS[gpu]), []
    for case in cases():
        for part in PARTS:
            shape = shape_of(case.values, part != INFERENCE)
            forward, backward = shape.calls(model.gpu.capability)
            cost = model.backward if part == BACKWARD else model.forward
            names = [s for s in STRATEGIES if shape.serves(s) and not (part == BACKWARD and s == STREAM)]
            times = {name: seconds(cost(shape, name)) for name in names}
            out.append((backward if part == BACKWARD else forward, times))
    return out


def report(rows: list[Row], source: str) -> None:
    """Print what today's choices lose, and RULES that lose less."""
    table = losses(rows, choose)
    print(f"{source}: {len(rows)} calls")
    for call, chosen, best, loss in table:
        kind = "tf32" if call.tf32 else str(call.dtype).removeprefix("torch.")
        part = " dX" if call.backward else "" if call.learning else " inference"
        size = f"{kind} M {call.M} IN {call.IN} OUT {call.OUT} R {call.R}{part}"
        verdict = f"was not measured; {best} was best" if isinf(loss) else f"loses {loss:.1%} to {best}"
        print(f"  {size}: {chosen}" + ("" if loss <= 0 else f" {verdict}"))
    known = [loss for *_, loss in table if not isinf(loss)]
    mean, unknown = sum(known) / max(1, len(known)), len(table) - len(known)
    print(f"today's RULES lose {mean:.1%} on average; the choice for {unknown} calls was not measured")
    print("Proposed, to be read before it is used:\n")
    for proposal in propose(rows):
        print(f"    {proposal.code(source)}")


def _report_file(path: Path) -> int:
    results = load_results(path)
    rows = rows_of(results)
    if not rows:
        print(f"{path} holds no measurement of a strategy", file=sys.stderr)
        return 2
    names = {launch["device"]["name"] for launch in results["launches"]}
    report(rows, f"measured, {', '.join(sorted(names))}")
    return 0


def _dry_run(todo: list[Case]) -> int:
    for case in todo:
        print(f"{case.key}: about {case.estimate:.0f} s")
    parts = ", ".join(PARTS)
    print(
        f"{len(todo)} cases ({parts}), about {sum(case.estimate for case in todo) / 60:.0f} minutes on a GPU, a guess"
    )
    for kind in dict.fromkeys(case.values["kind"] for case in todo):
        for part in PARTS:
            problem = Problem(
                shape_of({"M": 33, "N": 48, "D": 40, "R": 8, "kind": kind}, part != INFERENCE), torch.device("cpu")
            )
            errors = gate(problem.run(part, "", reference), problem.exact(part), part, kind)
            print(f"{kind} {part}, the formula against float64: {', '.join(f'{n} {e:.1g}' for n, e in errors.items())}")
    if not torch.cuda.is_available():
        print("no GPU: nothing was built; measuring needs an NVIDIA GPU")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda or cuda:1")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases with TEXT in their name, e.g. bfloat16/M8224")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=list(KINDS), help=", ".join(KINDS))
    parser.add_argument("--minutes", type=float, help="start no case that would end later; --resume goes on")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/gpu_model/results/tune-GPU.json)")
    parser.add_argument("--resume", action="store_true", help="go on with the result file")
    parser.add_argument("--dry-run", action="store_true", help="list the cases and check the formula; needs no GPU")
    parser.add_argument("--report", type=Path, metavar="JSON", help="print the proposal of a result file; needs no GPU")
    parser.add_argument("--model", choices=list(GPUS), help="print the proposal of the cost model; needs no GPU")
    return parser


if __name__ == "__main__":
    sys.exit(main())
