"""What users do first: build and install. Each runs pip in a process of its own."""

import os
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
from wheels import build_sdist, build_wheel, run, wheel_of

NVCC = shutil.which("nvcc") or ("/usr/local/cuda/bin/nvcc" if Path("/usr/local/cuda/bin/nvcc").exists() else None)
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")


def check_in_new_interpreter(wheel, tmp_path, code):
    target = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    # an editable install of this project puts a finder before sys.path: without it
    start = "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'ScikitBuild' not in type(f).__name__]\n"
    run(sys.executable, "-c", start + code, cwd=tmp_path, PYTHONPATH=str(target))


@pytest.mark.long
def test_one_wheel_holds_both_packages_and_works(repo, tmp_path):
    wheel = build_wheel(repo, tmp_path, "OFF")
    assert wheel.name.startswith("masm_ext-") and "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "masm_ext/libmasm_cpu.so" in names and "masm_ext/libmasm_cuda.so" not in names
    for folder in ("protocols", "recipes"):
        files = (repo / "python" / "masm_detect" / folder).glob("*.yaml")
        assert {f"masm_detect/{folder}/{path.name}" for path in files} <= set(names)
    assert "masm_detect/__init__.py" in names and not any(n.endswith((".cpp", ".cu")) for n in names)
    code = (
        "import torch, masm_ext, masm_detect, os\n"
        f"assert masm_ext.__file__.startswith({str(tmp_path)!r}), masm_ext.__file__\n"
        "l = masm_ext.MASMLinear.from_linear(torch.nn.Linear(8, 6), masm_ext.MASMConfig(subspace_rank=1))\n"
        "assert l(torch.ones(2, 8)).shape == (2, 6)"
    )
    check_in_new_interpreter(wheel, tmp_path, code)


@pytest.mark.kernels
@pytest.mark.long
def test_the_source_distribution_holds_all_that_a_build_needs(repo, tmp_path):
    (tmp_path / "checkout").mkdir()
    built = build_wheel(repo, tmp_path / "checkout", "OFF")
    wheel = wheel_of(build_sdist(repo, tmp_path), tmp_path, "OFF")
    names, expected = (set(zipfile.ZipFile(path).namelist()) for path in (wheel, built))
    assert names == expected
    check_in_new_interpreter(wheel, tmp_path, "import masm_ext; print(masm_ext.build_info())")


@pytest.mark.kernels
@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine: the CUDA library cannot be compiled")
@pytest.mark.long
def test_cuda_library_builds_beside_this_torch_for_every_architecture(repo, tmp_path):
    wheel = build_wheel(repo, tmp_path, "ON")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract("masm_ext/libmasm_cuda.so", tmp_path)
    library = tmp_path / "masm_ext" / "libmasm_cuda.so"
    cuobjdump = shutil.which("cuobjdump") or str(Path(NVCC).resolve().parent / "cuobjdump")
    if Path(cuobjdump).exists():
        listing = run(cuobjdump, "--list-elf", str(library))
        for architecture in ARCHITECTURES:
            assert f".{architecture}." in listing, listing
    code = (
        "import torch, masm_ext\n"
        "info = masm_ext.build_info()['libraries']['libmasm_cuda']\n"
        "assert (info == 'loaded') == (torch.version.cuda is not None), info"
    )
    check_in_new_interpreter(wheel, tmp_path, code)
    # Loaded as beside a CUDA build, it holds every op that the table says it serves. A CPU build has no CUDA streams.
    stub, streams = tmp_path / "streams.c", tmp_path / "streams.so"
    stub.write_text("int aoti_torch_get_current_cuda_stream(int device, void** stream) { return 1; }\n")
    run(os.environ.get("CC", "cc"), "-shared", "-fPIC", stub, "-o", streams)
    code = (
        "import torch, ctypes\n"
        f"if torch.version.cuda is None: ctypes.CDLL({str(streams)!r}, ctypes.RTLD_GLOBAL)\n"
        "torch.version.cuda = torch.version.cuda or 'made to believe'\n"
        "import masm_ext\n"
        "from masm_ext.ops.dispatch import IMPLEMENTATIONS\n"
        "assert masm_ext.build_info()['libraries']['libmasm_cuda'] == 'loaded'\n"
        "served = {op for (op, device), (kind, _) in IMPLEMENTATIONS.items() if (device, kind) == ('cuda', 'CUDA')}\n"
        "assert served >= {'masked_adamw_', 'update_masks_'}, served\n"
        "held = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "assert all(held(f'masm::{op}', 'CUDA') for op in served), served"
    )
    check_in_new_interpreter(wheel, tmp_path, code)
