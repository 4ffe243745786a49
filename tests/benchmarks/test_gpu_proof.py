"""make gpu-proof: every stage has its time, its outcome and its output, whatever the others do."""

import importlib.util
import json
import subprocess
import sys
import time

import pytest


@pytest.fixture
def proof(request):
    path = request.config.rootpath / "benchmarks" / "gpu_proof.py"
    spec = importlib.util.spec_from_file_location("gpu_proof", path)
    module = sys.modules["gpu_proof"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu_proof"]


def stage(proof, name, code, limit=30, needs=None):
    command = [sys.executable, "-c", code]
    return proof.Stage(name, limit, command, command, needs)


@pytest.fixture
def execute(proof, monkeypatch, tmp_path):
    """Run these stages as the program would; returns its exit code and the outcomes by stage."""

    def executed(*found, arguments=()):
        monkeypatch.setattr(proof, "stages", lambda out, architecture: list(found))
        monkeypatch.setattr(sys, "argv", ["gpu_proof.py", "--out", str(tmp_path), "--rehearse", *arguments])
        code = proof.main()
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert summary["rehearsal"] is True
        return code, {one["stage"]: one for one in summary["stages"]}

    return executed


def test_a_failure_and_a_hang_stop_no_other_stage(proof, execute, tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', '{'import time; time.sleep(600)'}'])"
    began = time.monotonic()
    code, outcomes = execute(
        stage(proof, "first", "print('one'); print('two')"),
        stage(proof, "wrong", "raise SystemExit('no kernel')"),
        stage(proof, "hang", f"print('begun', flush=True); {child}", limit=3),
        stage(proof, "absent", "", needs="no-such-program"),
        stage(proof, "last", "print('done')"),
    )
    assert code == 1 and time.monotonic() - began < 60
    assert {name: one["outcome"] for name, one in outcomes.items()} == {
        "first": "passed", "wrong": "failed", "hang": "out of time", "absent": "missing", "last": "passed",
    }  # fmt: skip
    assert outcomes["first"]["last_line"] == "two" and outcomes["wrong"]["last_line"] == "no kernel"
    assert outcomes["hang"]["last_line"] == "begun" and 3 <= outcomes["hang"]["seconds"] < 10
    log = (tmp_path / "log.txt").read_text()
    assert log.index("=== first") < log.index("\none\ntwo") < log.index("=== wrong") < log.index("done")


def test_nothing_runs_without_a_build_or_without_time(proof, execute):
    code, outcomes = execute(stage(proof, "build", "raise SystemExit(1)"), stage(proof, "test", "print(1)"))
    assert code == 1 and outcomes["test"]["outcome"] == "not started"
    code, outcomes = execute(stage(proof, "test", "print(1)"), arguments=["--minutes", "0.1"])
    assert code == 1 and outcomes["test"]["outcome"] == "not started"


def test_stages_can_be_chosen(proof, execute, capsys):
    code, outcomes = execute(stage(proof, "a", "print(1)"), stage(proof, "b", "print(2)"), arguments=["--stages", "b"])
    assert code == 0 and list(outcomes) == ["b"]
    assert execute(stage(proof, "a", "print(1)"), arguments=["--stages", "c"])[0] == 2
    assert "no stage c; there are a" in capsys.readouterr().err


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
    assert build.name == "build" and build.command[-1] == f"cmake.define.MASM_CUDA_ARCHS={name}"


def test_every_stage_names_a_program_of_the_project(proof, request, tmp_path):
    root = request.config.rootpath
    for one in proof.stages(tmp_path, "90a-real"):
        for command in (one.command, one.rehearsal):
            for part in command:
                assert not part.endswith(".py") or (root / part).is_file(), part
    makefile = subprocess.run(["make", "-n", "gpu-proof"], cwd=root, capture_output=True, text=True)
    assert "benchmarks/gpu_proof.py --out gpu-proof" in makefile.stdout
