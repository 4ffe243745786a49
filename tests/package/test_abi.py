"""One build for every torch from 2.10 on: `make test-abi` installs other releases and loads this build beside them."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from wheels import build_wheel

OTHERS = sorted(Path(sys.prefix).glob("torch-*/bin/python"))

#: Each op against its formula, forward and backward, a step of the optimizer, and the two files of an adapter.
CHECK = """
import sys, tempfile, torch, masm_ext
from masm_ext import MASMConfig, MASMLinear, MaskedAdamW, convert, load_adapter, param_groups, save_adapter
from masm_ext.reference.subspace_linear import subspace_linear as formula

assert torch.__version__.split("+")[0] == sys.argv[1], torch.__version__
assert masm_ext.build_info()["libraries"]["libmasm_cpu"] == "loaded", masm_ext.build_info()
for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2)):
    for rows in (1, 7, 300):
        layer = MASMLinear.from_linear(torch.nn.Linear(37, 29), MASMConfig(num_subspaces=2, subspace_rank=3)).to(dtype)
        x = torch.randn(rows, 37, dtype=dtype, requires_grad=True)
        y = layer(x)
        exact = torch.nn.functional.linear(x.detach().double(), layer.folded_weight().double(), layer.bias.double())
        assert (y.double() - exact).abs().max() < tolerance * exact.abs().max(), (dtype, rows)
        y.square().sum().backward()
        g = 2 * y.detach().double()
        wanted = g @ layer.folded_weight().double()
        assert (x.grad.double() - wanted).abs().max() < tolerance * wanted.abs().max(), (dtype, rows)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in (layer.u, layer.s, layer.v))
model = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Linear(20, 24))
base = {name: value.clone() for name, value in model.state_dict().items()}
convert(model, MASMConfig(subspace_rank=2), target_modules=["0", "1"], use_cache=False, progress=False)
optimizer = MaskedAdamW(param_groups(model, lr=1e-3), orthogonality=0.01, spectral_consistency=0.001)
for _ in range(3):
    model(torch.randn(5, 24)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
compiled = torch.compile(model, backend="aot_eager")
x = torch.randn(6, 24)
torch.testing.assert_close(compiled(x), model(x))
with tempfile.TemporaryDirectory() as folder:
    save_adapter(model, folder)
    again = torch.nn.Sequential(torch.nn.Linear(24, 20), torch.nn.Linear(20, 24))
    again.load_state_dict(base)
    load_adapter(again, folder)
    torch.testing.assert_close(again(x), model(x))
print("ok", torch.__version__)
"""


@pytest.fixture(scope="module")
def wheel(request, tmp_path_factory) -> Path:
    return build_wheel(request.config.rootpath, tmp_path_factory.mktemp("abi"), "OFF")


@pytest.mark.kernels
@pytest.mark.parametrize("python", [sys.executable, *OTHERS], ids=lambda path: Path(path).parents[1].name)
def test_the_wheel_works_with_this_torch(wheel, tmp_path, python):
    version = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__.split('+')[0])"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    site = tmp_path / "site"
    shutil.unpack_archive(wheel, site, "zip")
    command = [python, "-c", f"import sys; sys.path.insert(0, {str(site)!r})\n{CHECK}", version]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith(f"ok {version}"), done.stdout + done.stderr


@pytest.mark.kernels
def test_the_sources_compile_for_aarch64(repo):
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no cross compiler (Debian: apt install g++-aarch64-linux-gnu)")
    torch_headers = Path(sysconfig.get_path("purelib")) / "torch" / "include"
    flags = [
        "-std=c++20",
        "-O1",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-fopenmp-simd",
        "-fsyntax-only",
        "-DMASM_ISA=baseline",
    ]
    target = "-DTORCH_TARGET_VERSION=0x020A000000000000ULL"
    for source in sorted((repo / "csrc").glob("*.cpp")) + sorted((repo / "csrc" / "cpu").glob("*.cpp")):
        done = subprocess.run(
            [compiler, *flags, target, "-DMASM_ISA=baseline", "-isystem", torch_headers, source],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
