"""Compiles the kernels of `calls.py` in separate processes and prints their contents as JSON.

python tests/compile/worker.py [--reduced]            # {"triton": version, "kernels": {name: contents}, "tiles": [...]}
python tests/compile/worker.py --only 90 bf16         # for one capability and type
python tests/compile/worker.py --smoke                # a few calls on sm_90 in bf16
python tests/compile/worker.py [--reduced] --write    # writes the table of this version of Triton anew
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent / "registers.json"
#: Columns of the table.
RECORDED = ("registers", "shared")


def compile_group(job: tuple[int, str, str]) -> tuple[dict[str, dict[str, Any]], list[list[Any]]]:
    """All kernels for one capability and type, by name; each is compiled once and named after the first call. And the
    tiles they were compiled with: (capability, type, list, *tile)."""
    import calls
    import torch
    from cubin import contents
    from stand_in import compile_only

    from masm_ext.kernels.launch import Target

    capability, kind, plan = job
    dtype, torch.backends.cuda.matmul.fp32_precision = calls.TYPES[kind]
    kernels: dict[str, dict[str, Any]] = {}
    tiles: set[tuple[Any, ...]] = set()
    seen = set()
    for call in calls.of(plan, capability, kind):

        def record(kernel: str, constants: dict[str, Any], compiled: Any, call=call) -> None:
            if compiled.hash in seen:
                return
            seen.add(compiled.hash)
            constants = {k: v for k, v in constants.items() if isinstance(v, (bool, int, str))}
            name = base = f"sm_{capability} {kind} {call.name}: {kernel} {describe(constants)}"
            while name in kernels:
                name = f"{base} ({int(name[len(base) :].strip(' ()') or 1) + 1})"
            about = dict(capability=capability, kind=kind, kernel=kernel, aligned=call.aligned, constants=constants)
            about["half_factors"] = getattr(call, "half_factors", False)
            kernels[name] = about | contents(compiled)

        def record_tile(kernel: str, tile: tuple[int, ...]) -> None:
            tiles.add((capability, kind, kernel, *tile))

        with compile_only(capability, call.every_tile, record, record_tile):
            call.run(dtype, Target(capability, calls.PROCESSORS))
    return kernels, [list(tile) for tile in sorted(tiles)]


def describe(constants: dict[str, Any]) -> str:
    """ "128x256x64 R16 w8 s3 HAS_BIAS": the tile, warps and stages, and which flags are set."""
    tile = "x".join(str(constants[size]) for size in ("BM", "BN", "BW", "BK") if size in constants)
    rank = [f"R{constants['BR']}"] if "BR" in constants else []
    flags = sorted(k for k, v in constants.items() if v is True and k != "enable_fp_fusion")
    return " ".join([tile, *rank, f"w{constants['num_warps']}", f"s{constants['num_stages']}", *flags])


def compile_all(jobs: list[tuple[int, str, str]], processes: int) -> dict[str, Any]:
    """{"triton": version, "kernels": {name: what it is made of}, "tiles": [capability, type, list, *tile] each}."""
    kernels: dict[str, Any] = {}
    tiles: list[list[Any]] = []
    with multiprocessing.get_context("spawn").Pool(min(processes, len(jobs))) as pool:
        for done in pool.imap_unordered(compile_group, jobs, chunksize=1):
            kernels |= done[0]
            tiles += done[1]
    return {"triton": version("triton"), "kernels": dict(sorted(kernels.items())), "tiles": tiles}


def write_rows(path: Path, version: str, kernels: dict[str, dict[str, Any]], recorded: tuple[str, ...]) -> None:
    """Replaces the part of a table that a compiler's version has: a kernel a line."""
    from masm_ext.files import write_atomically

    table = json.loads(path.read_text()) if path.exists() else {}
    table[version] = {name: [k[key] for key in recorded] for name, k in kernels.items()}
    rows = [
        f"{json.dumps(release)}: {{\n"
        + ",\n".join(f"{json.dumps(name)}: {json.dumps(numbers)}" for name, numbers in sorted(kernels.items()))
        + "\n}"
        for release, kernels in sorted(table.items())
    ]
    write_atomically(path, ("{\n" + ",\n".join(rows) + "\n}\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="the default tiles only")
    parser.add_argument("--smoke", action="store_true", help="a few calls only, to see that the launch code compiles")
    parser.add_argument("--only", nargs=2, metavar=("CAPABILITY", "TYPE"), help="e.g. 90 bf16")
    parser.add_argument("--write", action="store_true", help=f"write {TABLE.name} instead of printing")
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    arguments = parser.parse_args()
    if arguments.write and (arguments.only or arguments.smoke):
        parser.error("--write writes the whole table: without --only and --smoke")
    # settings of Triton would change what is compiled, and its cache may hold kernels of another compiler
    for name in [name for name in os.environ if name.startswith("TRITON_")]:
        del os.environ[name]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        import calls

        plan = "smoke" if arguments.smoke else "reduced" if arguments.reduced else "full"
        wanted = tuple(arguments.only) if arguments.only else None
        jobs = [(c, k, plan) for c, k in calls.groups(plan) if wanted in (None, (str(c), k))]
        result = compile_all(jobs, arguments.processes)
    if arguments.write:
        write_rows(TABLE, result["triton"], result["kernels"], RECORDED)
    else:
        json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
