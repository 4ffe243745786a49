"""The CUDA kernel of masm::fold executed on the CPU, under address and undefined-behaviour sanitizers."""

import shutil
import subprocess

import numpy as np
import pytest
import torch
from tolerances import RELATIVE, relative_error

from masm_ext import reference

COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if COMPILER is None:
        pytest.skip("no C++ compiler on this machine")
    from pathlib import Path

    here = Path(__file__).parent
    out = tmp_path_factory.mktemp("emulation") / "fold"
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-Wall", "-Werror"]
    include = f"-I{here.parents[1] / 'csrc' / 'cuda'}"
    command = [COMPILER, *flags, "-I", str(here), include, str(here / "fold.cpp"), "-o", str(out)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    return out


@pytest.mark.parametrize("shape", [(5, 7, 3), (33, 65, 11), (1, 1, 1), (4, 31, 0), (7, 32, 16)], ids=str)
def test_kernel_matches_the_formula(program, shape, seed):
    N, D, R = shape
    args = torch.randn(N, D), torch.randn(R, N), torch.rand(R), torch.randn(R, D)
    data = np.array([N, D, R, seed], dtype=np.int64).tobytes() + b"".join(t.numpy().tobytes() for t in args)
    run = subprocess.run([program], input=data, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()[-2000:]
    got = torch.from_numpy(np.frombuffer(run.stdout, dtype=np.float32).copy()).view(N, D)
    assert relative_error(got, reference.fold(*(t.double() for t in args))) <= RELATIVE[torch.float32]
