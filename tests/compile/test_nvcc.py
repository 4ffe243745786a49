"""Every CUDA C++ kernel compiled for sm_80, sm_90a and sm_100a without a warning, and its machine code checked."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: it brings the tools that look at machine code")
sys.path.insert(0, str(Path(__file__).parent))
import nvcc

pytestmark = pytest.mark.skipif(
    nvcc.NVCC is None, reason="no nvcc on this machine: the CUDA C++ kernels cannot be compiled"
)

#: Kernels that pass once over much memory: they move 16 bytes at a time.
STREAMING = ("masked_adamw_kernel", "stream_linear_kernel")
#: Bytes of static shared memory a block may have.
SHARED = 48 * 1024


def compiled_for(source: str, architecture: str) -> dict:
    """What nvcc.py prints; a warning of the compiler is an error."""
    command = [sys.executable, str(Path(nvcc.__file__)), "--only", source, architecture]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def no_spills(k):
    return k["stack"] == 0 and k["spills"] == 0


def fits(k):
    return k["shared"] <= SHARED


def moves_16_bytes(k):
    stores = 12 if k["kernel"] == "masked_adamw_kernel" else 0  # p, m and v of four types
    return k["kernel"] not in STREAMING or (k["loads"]["16"] > stores and k["stores"]["16"] >= stores)


def multiplies(k):
    """The streaming kernels use tensor cores."""
    return k["kernel"] != "stream_linear_kernel" or k["mma"] > 0


CHECKS = (no_spills, fits, moves_16_bytes, multiplies)
SOURCES = [Path(source).stem for source in nvcc.sources()]


@pytest.mark.kernels
@pytest.mark.parametrize("architecture", nvcc.ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_every_kernel(source, architecture):
    check_kernels(source, architecture)


def test_the_masks_kernel():
    check_kernels("update_masks", "90a")


def check_kernels(source: str, architecture: str) -> None:
    result = compiled_for(source, architecture)
    kernels = result["kernels"]
    assert kernels and {name.partition(":")[0] for name in kernels} == {f"sm_{architecture} {source}"}
    assert {(c.__name__, name): k for c in CHECKS for name, k in kernels.items() if not c(k)} == {}
    known = json.loads(nvcc.TABLE.read_text()).get(result["nvcc"])
    if known is None:
        pytest.skip(f"{nvcc.TABLE.name} has no entry for nvcc {result['nvcc']}")
    # a change of registers or shared memory must be seen, not slip in
    known = {name: row for name, row in known.items() if name.startswith(f"sm_{architecture} {source}:")}
    now = {name: [k[key] for key in nvcc.RECORDED] for name, k in kernels.items()}
    changed = {n: (known.get(n), now.get(n)) for n in sorted(known.keys() | now.keys()) if known.get(n) != now.get(n)}
    assert changed == {}, "(committed, now) differ; if that is meant: python tests/compile/nvcc.py --write"


def test_the_sources_are_those_of_the_build():
    assert {"stream_linear", "masked_adamw", "update_masks"} <= set(SOURCES)


def test_the_checks_can_fail():
    good = {
        "kernel": "stream_linear_kernel", "types": "bf16, float", "registers": 90, "stack": 0, "shared": 256,
        "spills": 0, "loads": {"4": 1, "8": 0, "16": 9}, "stores": {"4": 1, "8": 0, "16": 0}, "mma": 16,
    }  # fmt: skip
    assert all(check(good) for check in CHECKS)
    for change, check in (
        ({"spills": 1}, no_spills),
        ({"stack": 8}, no_spills),
        ({"shared": SHARED + 1}, fits),
        ({"loads": {"4": 9, "8": 0, "16": 0}}, moves_16_bytes),
        ({"kernel": "masked_adamw_kernel", "types": "", "loads": {"4": 0, "8": 0, "16": 24}}, moves_16_bytes),
        ({"mma": 0}, multiplies),
    ):
        assert not check(good | change), (change, check)


def test_the_options_are_those_of_the_build():
    assert nvcc.options_of("csrc/cuda/masked_adamw.cu") == ["-fmad=false"]
    assert f"set(CMAKE_CUDA_STANDARD {nvcc.STANDARD})" in (nvcc.REPO / "CMakeLists.txt").read_text()
