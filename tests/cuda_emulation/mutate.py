"""Mutations of the CUDA kernels: one barrier or mask test after another taken out, and each of CHANGES made.

`test_mutate.py` runs the tests of the kernel with each of them; they must fail.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "csrc"

BARRIER = re.compile(r"\b(?:__syncthreads|__syncwarp|grid_barrier)\(\);")
#: A mask test or a vote of all threads -> its replacement.
TESTS = (
    (re.compile(r"[\w.*]*(?:mask|in_force|found)\w*(?:\[[^\]]*\])* == 0"), "false"),
    (re.compile(r"[\w.*]*(?:mask|in_force|found)\w*(?:\[[^\]]*\])* != 0"), "true"),
    (re.compile(r"\blive\[[^\]]*\](?! =)"), "true"),
    (re.compile(r"\b__syncthreads_or\("), "("),
)
#: Mistakes in the arithmetic, by file: part of a line -> its replacement.
CHANGES = {
    "masked_adamw.cuh": (
        # the signal with the moment after the update
        ("double(ms.at[j])", "double(ms.at[j] + c.one_minus_beta1 * (gradient - ms.at[j]))"),
        # a penalty reaches a masked block
        ("if (a.mask[at.block] == 0) continue", "if (a.mask[at.block] == 0 && !parameter(at.tensor).penalty) continue"),
        # the statistics of a first step
        ("a.work[i].step.signal_scale > 0 ? a.work[i].power : 0", "a.work[i].power"),
    ),
    "adamw.h": (
        ("c.rate = F(mask * lr)", "c.rate = F(lr)"),  # a soft mask does not scale the penalty
        ("p = p * c.decay - c.rate * penalty", "p = p * c.decay"),
        ("t > 1 ? 1 / (1 - std::pow(beta1, t - 1)) : 0", "1 / (1 - std::pow(beta1, t))"),  # the wrong correction
    ),
    "update_masks.h": (("p.decay * t.power[b]", "t.power[b]"),),
}


class Mutation(NamedTuple):
    file: str
    line: int
    text: str
    mutated: str

    @property
    def name(self) -> str:
        return f"{self.file}: {self.text.strip()} -> {self.mutated.strip() or 'nothing'}"


def kernels() -> list[Path]:
    """The sources that run on a GPU."""
    return sorted([*(SOURCES / "cuda").glob("*.cuh"), *(SOURCES / "math").glob("*.h")])


def mutations(file: Path) -> list[Mutation]:
    """Every mutation of a source, in the order of its lines."""
    found = []
    for number, line in enumerate(file.read_text().splitlines()):
        code = line.split("//")[0]
        changed = [BARRIER.sub("", code, count=1)] if BARRIER.search(code) else []
        for pattern, instead in TESTS:
            changed += [code[: m.start()] + instead + code[m.end() :] for m in pattern.finditer(code)]
        changed += [code.replace(old, new, 1) for old, new in CHANGES.get(file.name, ()) if old in code]
        found += [Mutation(file.name, number, code, other) for other in changed]
    return found


def tests_of(file: str) -> list[str]:
    """The test files of a source: its own, or all of them for a header that every kernel includes."""
    own = HERE / f"test_{'masked_adamw' if file == 'adamw.h' else Path(file).stem}.py"
    others = {"test_sanitized", "test_mutate"}
    return [str(own)] if own.exists() else sorted(str(p) for p in HERE.glob("test_*.py") if p.stem not in others)


def is_caught(mutation: Mutation | None, file: str) -> bool:
    """Whether the tests of `file` fail with this mutation; None: the kernel as it is."""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(SOURCES, sources)
        if mutation is not None:
            path = next(p for p in (sources / "cuda" / mutation.file, sources / "math" / mutation.file) if p.exists())
            lines = path.read_text().splitlines()
            lines[mutation.line] = mutation.mutated
            path.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--seed", "1", "-p", "no:cacheprovider", *tests_of(file)]
        environment = {**os.environ, "MASM_EMULATED_SOURCES": str(sources), "OMP_NUM_THREADS": "1"}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
        if "does not build" in run.stdout:
            raise RuntimeError(f"{mutation and mutation.name} does not build:\n{run.stdout[-3000:]}")
        if run.returncode > 1:  # not a failed test (1) and not a signal (negative)
            raise RuntimeError(f"pytest ended with {run.returncode}:\n{run.stdout[-3000:]}{run.stderr[-1000:]}")
        return run.returncode != 0
