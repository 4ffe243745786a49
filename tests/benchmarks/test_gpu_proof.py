"""make gpu-proof: every stage has its time, its outcome and its output, whatever the others do."""

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest


@pytest.fixture
def proof(request):
    path = request.config.rootpath / "benchmarks" / "gpu_proof.py"
    spec = importlib.util.spec_from_file_location("gpu_proof", path)
    module = sys.modules["gpu_proof"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_proof"]


def stage(proof, name, code, limit=30, **options):
    command = [sys.executable, "-c", code]
    return proof.Stage(name, limit, command, command, **options)


@pytest.fixture
def execute(proof, monkeypatch, tmp_path):
    """Run these stages as the program would on a GPU; returns its exit code and the outcomes by stage."""
    monkeypatch.setattr(proof.signal, "signal", lambda *_: None)  # the handlers of pytest stay

    def executed(*found, out="proof", arguments=()):
        monkeypatch.setattr(proof, "_architecture", lambda: "90a-real")
        monkeypatch.setattr(proof, "stages", lambda out, architecture: list(found))
        monkeypatch.setattr(sys, "argv", ["gpu_proof.py", "--out", str(tmp_path / out), *arguments])
        code = proof.main()
        summary = json.loads((tmp_path / out / "summary.json").read_text())
        return code, {one["stage"]: one for one in summary["stages"]}

    return executed


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_failure_and_a_hang_stop_no_other_stage(proof, execute, tmp_path):
    """The hanging stage has started a process of its own, which must not outlive it; so has one that ends well."""
    child = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    child += "print('child', child.pid, flush=True); "
    code, outcomes = execute(
        stage(proof, "first", "print('one'); print('two')"),
        stage(proof, "wrong", "raise SystemExit('no kernel')"),
        stage(proof, "hang", child + "child.wait()", limit=5),
        stage(proof, "absent", "", needs="no-such-program"),
        proof.Stage("none", 5, ["no-such-program"], []),
        stage(proof, "last", child),
    )
    assert code == 1
    assert {name: one["outcome"] for name, one in outcomes.items()} == {
        "first": "passed", "wrong": "failed", "hang": "out of time", "absent": "missing", "none": "failed",
        "last": "passed",
    }  # fmt: skip
    assert outcomes["first"]["last_line"] == "two" and outcomes["wrong"]["last_line"] == "no kernel"
    assert "no-such-program" in outcomes["none"]["last_line"] and outcomes["hang"]["seconds"] >= 5
    pids = [int(outcomes[name]["last_line"].split()[1]) for name in ("hang", "last")]
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, pids))
    log = (tmp_path / "proof" / "log.txt").read_text()
    assert log.index("=== first") < log.index("\none\ntwo") < log.index("=== wrong") < log.index("=== last")


def test_nothing_runs_without_a_build_or_without_time(proof, execute):
    later = stage(proof, "test", "print(1)")
    code, outcomes = execute(stage(proof, "build", "raise SystemExit(1)", required=True), later)
    assert code == 1 and outcomes["test"]["outcome"] == "not started"
    code, outcomes = execute(later, out="short", arguments=["--minutes", "0.1"])
    assert code == 1 and outcomes["test"]["outcome"] == "not started"


def test_a_timed_stage_is_told_to_stop_before_its_limit(proof, execute):
    show = "import sys; print(sys.argv[1:])"
    code, outcomes = execute(stage(proof, "layer", show, limit=150, timed=True))
    assert code == 0 and outcomes["layer"]["last_line"] == "['--minutes', '2.00']"
    _, outcomes = execute(stage(proof, "layer", show, limit=150, timed=True), out="b", arguments=["--minutes", "1"])
    minutes = float(outcomes["layer"]["last_line"].split("'")[3])
    assert 0.7 <= minutes <= 0.8  # of what is left


def test_stages_can_be_chosen_and_no_visit_is_overwritten(proof, execute, capsys):
    both = stage(proof, "a", "print(1)"), stage(proof, "b", "print(2)")
    code, outcomes = execute(*both, arguments=["--stages", "b"])
    assert code == 0 and list(outcomes) == ["b"]
    assert execute(*both)[0] == 2 and "holds an earlier visit: give another --out" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        execute(*both, out="c", arguments=["--stages", "c"])
    assert "no stage c; there are a, b" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(proof, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(proof, "_architecture", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_proof.py", "--out", str(tmp_path / "proof")])
    assert proof.main() == 2 and not (tmp_path / "proof").exists()
    assert "nvidia-smi finds no GPU here; --rehearse runs without one" in capsys.readouterr().err


@pytest.mark.parametrize(("capability", "name"), [("8.0", "80-real"), ("9.0", "90a-real"), ("10.0", "100a-real")])
def test_the_architecture_is_that_of_the_gpu(proof, monkeypatch, tmp_path, capability, name):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {capability}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert proof._architecture() == name
    build = proof.stages(tmp_path, name)[0]
    assert build.name == "build" and f"cmake.define.MASM_CUDA_ARCHS={name}" in build.command


def test_every_program_takes_its_arguments(proof, request, tmp_path):
    """The rehearsal: the same commands, but for the build, which has no dry run, and the tests, which are collected."""
    root = request.config.rootpath
    found = proof.stages(tmp_path, "90a-real")
    for one in found:
        if one.timed:
            assert one.rehearsal == [*one.command, "--dry-run"] and (root / one.command[1]).is_file()
    (one,) = [one for one in found if one.name == "optimizer"]
    outcome = proof.run(one, 300, tmp_path / "log.txt", rehearse=True)
    assert outcome.outcome == "passed", (tmp_path / "log.txt").read_text()
    (one,) = [one for one in found if one.name == "memcheck"]
    outcome = proof.run(one, 60, tmp_path / "log.txt", rehearse=True)
    log = (tmp_path / "log.txt").read_text()
    assert outcome.outcome == "passed" and "--tool $tool" in log and "--first-only || exit 1" in log, log
    makefile = subprocess.run(["make", "-n", "gpu-proof"], cwd=root, capture_output=True, text=True)
    assert "benchmarks/gpu_proof.py --out gpu-proof" in makefile.stdout
