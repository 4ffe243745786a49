"""Every kernel compiled for sm_80, sm_90 and sm_100 through the real launch code, and its machine code looked at."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from tritons import OTHER, VERSIONS, environment_of

pytest.importorskip("triton", reason="Triton is not installed (it has no build for this platform?)")
from masm_ext.kernels.launch import Target
from masm_ext.kernels.tiles import GEMM_TMA, PENALTY, TILES, WIDE_T, tiles

sys.path.insert(0, str(Path(__file__).parent))
import calls

WORKER = Path(__file__).parent / "worker.py"
TABLE = Path(__file__).parent / "registers.json"
#: Bytes of shared memory a program may have. What is compiled for sm_80 also serves 8.6, 8.9 and 12.x, which have less.
SHARED = {80: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
#: The instruction of a tensor core's product, and how it names the operands.
INSTRUCTION = {80: "mma", 90: "wgmma", 100: "tcgen05", 120: "mma"}
#: Which calls each Triton compiles.
PLAN = {"pinned": "full", "3.6": "reduced"}
FLOAT32 = {kind: (torch.float32, kind) for kind in ("tf32", "ieee")}
#: Kernels that multiply nothing, or exactly.
OPTIMIZER = {"inspect_gradients", "update_segments", "update_masks"}
WITHOUT = {"finish", "fold_weight", *OPTIMIZER}


def compiled_in(triton: str, *options: str) -> dict:
    """What worker.py prints in a process that imports this Triton."""
    command = [sys.executable, str(WORKER), "--processes", "1", *options]
    run = subprocess.run(command, env=environment_of(triton), capture_output=True, text=True, timeout=2400)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def wrong(result, holds):
    """The kernels for which `holds(kernel)` is not true, with what they are made of."""
    return {name: k for name, k in result["kernels"].items() if not holds(k)}


def fast(k):
    """Does the kernel run at the pace of tensor cores?"""
    exact = k["kind"] == "ieee" and k["constants"].get("PRECISION") != "tf32x3"  # the penalty's, in every type
    return k["kernel"] not in WITHOUT and not exact


def no_spills(k):
    return k["stack"] == 0 and k["spills"] == 0


def fits(k):
    return k["shared"] <= SHARED[k["capability"]]


def multiplies(k):
    """At least one product by the capability's own instruction (or, where a tile has fewer than 64 rows, the older)."""
    if not fast(k):
        return k["mma"] == []
    tall = k["constants"].get("BM", 0) >= 64
    return any(m.split()[0] == INSTRUCTION[k["capability"]] for m in k["mma"]) or (not tall and k["mma"] != [])


def low_rank_in_tf32(k):
    """Beside half precision the product with T * s is tf32."""
    gemm = k["kernel"].startswith("subspace_gemm") and k["kind"] in ("bf16", "fp16")
    return not gemm or any("tf32" in m for m in k["mma"])


def moves(k):
    """Tiles arrive by the TMA, or 16 bytes at a time where rows are aligned."""
    if k["kernel"] == "subspace_gemm_tma":
        return k["tma"]
    even = k["constants"].get("EVEN") and k["kind"] in ("bf16", "fp16")  # else elements have conditions of their own
    return not (even and k["aligned"]) or k["widest"] >= 16


def keeps_multiplying(k):
    """On sm_90 a loop waits for earlier products only: with 0 pending the tensor cores run empty in each step."""
    loops, half = k["loops"], k["kind"] in ("bf16", "fp16")
    if k["kernel"].startswith("subspace_gemm"):
        if not k["constants"]["COMPUTE_T"]:
            loops = loops[:-1]  # the loop over chunks of R, one step or a few: not pipelined, which would cost memory
        if not k["aligned"] or k["constants"].get("EVEN") is False:
            return True  # elements come through registers, each with a condition
        if k["kernel"] == "subspace_gemm" and k["constants"]["COMPUTE_T"] and half:
            return True  # few rows: a launch that rounds V would cost more than the waits
        if not half and not k["constants"].get("A_IS_OUT_IN"):
            return True  # wgmma takes tf32 along the inner dimension only: the weight of dX is transposed on the way
    elif k["constants"].get("PRECISION") == "tf32x3":
        return True  # what is multiplied is split in three parts, in registers
    elif half and k["kernel"] in ("skinny_both", "skinny_reduce"):
        return True  # T is float32 and rounded for each tile; `skinny_both` also writes Q in each step
    elif half and k["kernel"] == "skinny" and not k["half_factors"]:
        return True  # bound by memory: a launch that rounds the factor would cost more than the waits
    return all(pending > 0 for pending in loops)


def loads_ahead(k):
    """On sm_90 half precision has three stages or more, so that loads overlap products (2 are one buffer)."""
    loaded = k["capability"] == 90 and k["kind"] in ("bf16", "fp16") and k["kernel"] not in WITHOUT
    # unaligned rows come through registers, by a tile of their own
    return not loaded or not k["aligned"] or k["constants"]["num_stages"] >= 3


CHECKS = [no_spills, fits, multiplies, low_rank_in_tf32, moves, keeps_multiplying, loads_ahead]


def faults(result: dict) -> dict[str, dict]:
    """check -> the kernels that do not pass it."""
    found = {check.__name__: wrong(result, check) for check in CHECKS}
    return {name: kernels for name, kernels in found.items() if kernels}


GROUPS = [(triton, *group) for triton in VERSIONS for group in calls.groups(PLAN[triton])]


@pytest.mark.kernels
@pytest.mark.parametrize(("triton", "capability", "kind"), GROUPS)
@pytest.mark.long
def test_every_kernel(triton, capability, kind):
    reduced = ["--reduced"] if PLAN[triton] == "reduced" else []
    result = compiled_in(triton, "--only", str(capability), kind, *reduced)
    assert faults(result) == {}
    kernels = {k["kernel"] for k in result["kernels"].values()}
    assert kernels >= expected(PLAN[triton], capability, kind)
    if PLAN[triton] == "full":  # other versions of Triton compile the default tiles only
        assert listed(capability, kind) - {tuple(row) for row in result["tiles"]} == set()
    check_table(result, capability, kind, reduced)


@pytest.mark.long
def test_the_launch_code_compiles():
    result = compiled_in("pinned", "--smoke")
    assert faults(result) == {}
    assert {k["kernel"] for k in result["kernels"].values()} >= {"subspace_gemm_tma", "skinny_reduce", *OPTIMIZER}


def expected(plan: str, capability: int, kind: str) -> set[str]:
    """Kernels that a group holds at least."""
    if capability not in (80, 90, 100) or kind != "bf16":
        return {"skinny"} if kind != "fp16" else {"subspace_gemm" if capability == 80 else "subspace_gemm_tma"}
    tma = {"subspace_gemm_tma"} if capability >= 90 else set()
    return {"skinny", "skinny_both", "skinny_reduce", "subspace_gemm", "finish", *OPTIMIZER, *tma}


def listed(capability: int, kind: str) -> set[tuple]:
    """Every tile that tuning may choose."""
    types = {"bf16": (torch.bfloat16, "ieee"), **FLOAT32}
    if kind not in types or capability not in (80, 90, 100):
        return set()
    lists = {kernel for kernel, _, _ in TILES} - {PENALTY}  # which has one tile and is not tuned
    found = {
        (capability, kind, kernel, *tile)
        for kernel in lists
        if kernel not in (GEMM_TMA, WIDE_T) or (capability >= 90 and kind != "ieee")
        for tile in tiles(kernel, Target(capability, 1), *types[kind])
    }
    assert len(found) > 5
    return found


def check_table(result: dict, capability: int, kind: str, reduced: list[str]) -> None:
    """A change of registers or shared memory must be seen, not slip in."""
    known = json.loads(TABLE.read_text()).get(result["triton"])
    if known is None:
        pytest.skip(f"{TABLE.name} has no entry for Triton {result['triton']}")
    known = {name: row for name, row in known.items() if name.startswith(f"sm_{capability} {kind} ")}
    now = {name: [k["registers"], k["shared"]] for name, k in result["kernels"].items()}
    changed = {n: (known.get(n), now.get(n)) for n in sorted(known.keys() | now.keys()) if known.get(n) != now.get(n)}
    command = " ".join(["python tests/compile/worker.py --write", *reduced])
    if result["triton"] != version("triton"):
        command = f"PYTHONPATH={OTHER} {command}"
    assert changed == {}, f"(committed, now) differ; if that is meant: {command}"


def test_the_table_holds_both_versions_and_no_group_that_is_not_compiled():
    table = json.loads(TABLE.read_text())
    assert set(table) >= {"3.6.0", "3.9.0"}
    for release, plan in (("3.9.0", "full"), ("3.6.0", "reduced")):
        found = {tuple(name.split()[:2]) for name in table[release]}
        assert found == {(f"sm_{capability}", kind) for capability, kind in calls.groups(plan)}


def test_the_checks_can_fail():
    good = {
        "capability": 90, "kind": "bf16", "kernel": "subspace_gemm_tma", "aligned": True, "constants": {"BM": 128},
        "registers": 200, "stack": 0, "spills": 0, "shared": 150_000, "tensor_memory": 0, "widest": 4, "tma": True,
        "mma": ["wgmma k16 bf16", "wgmma k8 tf32"], "loops": [2], "half_factors": False,
    }  # fmt: skip
    good["constants"] = {"BM": 128, "COMPUTE_T": True, "A_IS_OUT_IN": False, "num_stages": 3}
    assert all(check(good) for check in CHECKS)
    for change, check in (
        ({"spills": 2}, no_spills),
        ({"stack": 8}, no_spills),
        ({"shared": 232_449}, fits),
        ({"capability": 80, "shared": 101_377}, fits),
        ({"mma": []}, multiplies),
        ({"mma": ["mma k16 bf16"]}, multiplies),
        ({"kind": "ieee"}, multiplies),
        ({"mma": ["wgmma k16 bf16"]}, low_rank_in_tf32),
        ({"tma": False}, moves),
        ({"loops": [0]}, keeps_multiplying),
        ({"loops": [1, 0, 0], "constants": good["constants"] | {"COMPUTE_T": False}}, keeps_multiplying),
        ({"kernel": "skinny", "half_factors": True, "loops": [0]}, keeps_multiplying),
        ({"kernel": "skinny", "kind": "tf32", "loops": [0]}, keeps_multiplying),
        ({"kernel": "skinny_both", "constants": {"num_stages": 2}}, loads_ahead),
        ({"kernel": "skinny", "constants": {"BM": 64, "EVEN": True}}, moves),
    ):
        assert not check(good | change), (change, check)
