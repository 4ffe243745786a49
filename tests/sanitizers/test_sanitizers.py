"""The operator tests again, on a CPU library built with sanitizers: no bad memory access, no undefined behaviour, no
data race. A library with a race put into it must be caught, so that silence means something."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMPILER = os.environ.get("CXX", "c++")

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="the sanitizers are preloaded as on Linux"),
    pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no compiler {COMPILER}"),
    pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("ninja") is None, reason="no cmake or no ninja"),
]


def runtime(name: str) -> str:
    """The sanitizer's runtime library, or a skip that says which one is missing."""
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        pytest.skip(f"{COMPILER} has no {name}")
    return found


def build(source: Path, out: Path, sanitizers: str) -> Path:
    """A folder that holds masm_ext with a CPU library built with ``sanitizers``."""
    options = ["-G", "Ninja", "-DMASM_CUDA=OFF", f"-DMASM_SANITIZE={sanitizers}"]
    options.append(f"-DPython_EXECUTABLE={sys.executable}")
    for command in (["cmake", "-S", source, "-B", out / "build", *options], ["cmake", "--build", out / "build"]):
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]
    shutil.copytree(source / "masm_ext", out / "masm_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(out / "build" / "libmasm_cpu.so", out / "masm_ext")
    # an editable install would be found before PYTHONPATH
    (out / "sitecustomize.py").write_text(
        "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if '_editable_' not in type(f).__module__]\n"
    )
    return out


def run_ops(
    package: Path, preload: list[str], select: str, repo: Path, *options: str, **env: str
) -> subprocess.CompletedProcess:
    """Run the tests of tests/ops that `select` chooses (as of pytest -k) on the library in `package`."""
    tests = str(repo / "tests" / "ops")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", select, *options]
    if shutil.which("setarch") and subprocess.run(["setarch", "-R", "true"], capture_output=True).returncode == 0:
        command = ["setarch", "-R", *command]  # ThreadSanitizer wants the memory layout it knows
    return subprocess.run(
        command,
        cwd=package / "build",  # not the repository, whose masm_ext/ would be imported instead
        env={**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "2", "LD_PRELOAD": " ".join(preload), **env},
        capture_output=True,
        text=True,
    )


def check(run: subprocess.CompletedProcess) -> None:
    output = run.stdout + run.stderr
    assert run.returncode == 0 and " passed" in run.stdout and "Sanitizer" not in output, output[-5000:]


def addresses_and_undefined_behaviour(tmp_path, repo, *options: str, threads: tuple[str, ...]) -> None:
    preload = [runtime("libasan.so"), runtime("libubsan.so"), runtime("libstdc++.so")]
    package = build(repo, tmp_path, "address,undefined")
    for number in threads:
        # the instruction sets are tested in processes that set their own number of threads: once is enough
        select = "not opcheck and not instruction_set" if number == "1" else "not opcheck"
        # Python keeps memory until it ends
        settings = {"OMP_NUM_THREADS": number, "ASAN_OPTIONS": "detect_leaks=0"}
        check(run_ops(package, preload, select, repo, *options, **settings))


@pytest.mark.kernels
@pytest.mark.long
def test_addresses_and_undefined_behaviour(tmp_path, repo):
    addresses_and_undefined_behaviour(tmp_path, repo, threads=("1", "2"))


@pytest.mark.long
def test_addresses_and_undefined_behaviour_of_one_case_a_test(tmp_path, repo):
    addresses_and_undefined_behaviour(tmp_path, repo, "--first-only", threads=("2",))


def ordered_gomp(out: Path) -> str:
    library = out / "ordered_gomp.so"
    source = HERE / "ordered_gomp.cpp"
    subprocess.run(
        [COMPILER, "-O1", "-fsanitize=thread", "-shared", "-fPIC", source, "-o", library, "-ldl"], check=True
    )
    return str(library)


@pytest.mark.kernels
@pytest.mark.long
def test_threads(tmp_path, repo):
    preload = [runtime("libtsan.so"), ordered_gomp(tmp_path), runtime("libstdc++.so")]
    package = build(repo, tmp_path, "thread")
    check(run_ops(package, preload, "not opcheck and not instruction_set", repo))


@pytest.mark.kernels
@pytest.mark.long
def test_a_race_is_caught(tmp_path, repo):
    preload = [runtime("libtsan.so"), ordered_gomp(tmp_path), runtime("libstdc++.so")]
    copy = tmp_path / "racy"
    copy.mkdir()
    for name in ("csrc", "masm_ext"):
        shutil.copytree(repo / name, copy / name)
    shutil.copy(repo / "CMakeLists.txt", copy)
    file = copy / "csrc" / "cpu" / "subspace_linear.cpp"
    own, shared = "du_part.data() + c * L * N", "du_part.data()"
    assert own in file.read_text()
    file.write_text(file.read_text().replace(own, shared))  # all tasks add into the sums of the first
    package = build(copy, tmp_path / "built", "thread")
    run = run_ops(package, preload, "number_of_threads and not adamw", repo, TSAN_OPTIONS="exitcode=66")
    assert "ThreadSanitizer: reported" in run.stderr
