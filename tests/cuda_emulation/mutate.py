"""Shows that the emulation's tests would notice: takes one barrier or mask test after another out of the kernels, or
makes one of CHANGES, and runs the tests of that kernel, which must fail.

python tests/cuda_emulation/mutate.py            # all; the table goes to mutations.json
python tests/cuda_emulation/mutate.py stream_linear ...   # of these files only; the rest of the table stays
"""

from __future__ import annotations

import argparse
import json
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
TABLE = HERE / "mutations.json"

BARRIER = re.compile(r"\b(?:__syncthreads|__syncwarp|grid_barrier)\(\);")
#: What a mask test, or a question to all threads, looks like -> what stands there instead.
TESTS = (
    (re.compile(r"[\w.*]*(?:mask|in_force|found)\w*(?:\[[^\]]*\])* == 0"), "false"),
    (re.compile(r"[\w.*]*(?:mask|in_force|found)\w*(?:\[[^\]]*\])* != 0"), "true"),
    (re.compile(r"\blive\[[^\]]*\](?! =)"), "true"),
    (re.compile(r"\b__syncthreads_or\("), "("),
)
#: Mistakes of the optimizer's own kind, by file: what stands in one line -> what stands there instead.
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
    """device.cuh and mma.cuh serve all kernels, a header of csrc/math its own."""
    own = HERE / f"test_{'masked_adamw' if file == 'adamw.h' else Path(file).stem}.py"
    others = {"test_sanitized", "test_mutate"}
    return [str(own)] if own.exists() else sorted(str(p) for p in HERE.glob("test_*.py") if p.stem not in others)


def is_caught(mutation: Mutation | None, file: str) -> bool:
    """Do the tests of `file` fail with this mutation?"""
    with tempfile.TemporaryDirectory() as folder:
        sources = Path(folder) / "csrc"
        shutil.copytree(SOURCES, sources)
        if mutation is not None:
            path = next(p for p in (sources / "cuda" / mutation.file, sources / "math" / mutation.file) if p.exists())
            lines = path.read_text().splitlines()
            lines[mutation.line] = mutation.mutated
            path.write_text("\n".join(lines) + "\n")
        command = [sys.executable, "-m", "pytest", "-q", "-x", "--seed", "1", "-p", "no:cacheprovider", *tests_of(file)]
        environment = {**os.environ, "MASM_EMULATED_SOURCES": str(sources)}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
        if "does not build" in run.stdout:
            raise RuntimeError(f"{mutation and mutation.name} does not build:\n{run.stdout[-3000:]}")
        return run.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stems", nargs="*", help="kernel files without their suffix; all by default")
    stems = parser.parse_args().stems
    files = [p for p in kernels() if not stems or p.stem in stems]
    table: dict[str, str] = {}
    for file in files:
        own = mutations(file)
        if own and is_caught(None, file.name):
            raise RuntimeError(f"the tests of {file.name} fail without a mutation")
        for mutation in own:
            result = "caught" if is_caught(mutation, file.name) else "NOT CAUGHT"
            name = mutation.name
            while name in table:
                name += "'"
            table[name] = result
            print(f"{result}: {name}", flush=True)
    known = json.loads(TABLE.read_text()) if stems and TABLE.exists() else {}
    others = {name: result for name, result in known.items() if name.split(":")[0] not in {p.name for p in files}}
    TABLE.write_text(json.dumps(dict(sorted((others | table).items())), indent=1) + "\n")
    missed = [name for name, result in table.items() if result == "NOT CAUGHT"]
    print(f"{len(table)} mutations, {len(missed)} not caught")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
