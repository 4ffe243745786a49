"""The examples for clusters: scripts and manifests are valid, and masm and torchrun accept the command in each."""

from __future__ import annotations

import os
import re
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

main = pytest.importorskip("masm_detect.commands.main", reason="needs the extra masm_ext[detect]")

#: Notes its name and its arguments, one a line, in the file RECORD.
STUB = '#!/bin/bash\nprintf "%s\\n" "call $(basename "$0")" "$@" >> "$RECORD"\n'
ENDINGS = {
    "srun": 'exit "${CODE:-0}"\n',
    "torchrun": "",
    "scontrol": 'if [[ $1 == show ]]; then printf "node7\\nnode8\\n"; fi\n',
}


@pytest.fixture
def examples(repo) -> Path:
    return repo / "docs" / "examples"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """The working folder of a job: run.yaml, and bin/ with srun, torchrun and scontrol that only note their calls."""
    (tmp_path / "bin").mkdir()
    for name, ending in ENDINGS.items():
        (tmp_path / "bin" / name).write_text(STUB + ending)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "run.yaml").write_text("data: {paths: [faces.json]}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: list[str], work: Path, **environment: str) -> tuple[int, dict[str, list[str]]]:
    """Exit code of a command, and the arguments of the last call of each stub."""
    record = work / "record"
    record.write_text("")
    known = {"PATH": f"{work / 'bin'}:{os.environ['PATH']}", "RECORD": str(record)}
    done = subprocess.run(command, cwd=work, env={**known, **environment}, capture_output=True, text=True)
    calls = [part.splitlines() for part in re.split(r"^call ", record.read_text(), flags=re.MULTILINE)[1:]]
    assert calls, done.stderr
    return done.returncode, {name: arguments for name, *arguments in calls}


def check_command(torchrun: list[str], resume: bool):
    """Parse the arguments of a torchrun that starts masm, by the parsers of both; returns those of torchrun."""
    launcher = get_args_parser().parse_args(torchrun)
    assert launcher.module and launcher.training_script == "masm_detect"
    # with several machines the counts of restarts can differ, and distributed.py uses them
    assert launcher.max_restarts == 0
    words = launcher.training_script_args
    parser, modules = main.build_parser()
    values = parser.parse_args(main.completed(words, modules))
    assert values.subcommand == "train" and values.train.out == "runs/celeb" and values.train.resume is resume
    parser.instantiate(values)
    return launcher


def begin_run(work: Path) -> None:
    """What makes `runs/celeb` a run that was begun."""
    (work / "runs" / "celeb").mkdir(parents=True)
    (work / "runs" / "celeb" / "config.yaml").write_text("data: {paths: [faces.json]}\n")


def slurm_options(path: Path) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", path.read_text(), flags=re.MULTILINE)
    assert len(found) == path.read_text().count("#SBATCH "), "an option that is not --name or --name=value"
    return dict(found)


def test_slurm_script_is_bash_and_its_options_are_those_of_sbatch(examples):
    path = examples / "train.slurm"
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).returncode == 0
    options = slurm_options(path)
    assert options.keys() == {
        "job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task", "time", "signal", "requeue",
        "open-mode", "output",
    }  # fmt: skip
    assert options["ntasks-per-node"] == "1"  # one torchrun a node
    assert options["signal"] == "TERM@120" and options["open-mode"] == "append"
    assert re.fullmatch(r"\d\d:\d\d:\d\d", options["time"])
    # sbatch reads options up to the first command only
    lines = path.read_text().splitlines()
    last = max(number for number, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[: last + 1])


def test_slurm_script_resumes_and_goes_back_into_the_queue_at_the_limit_only(examples, work):
    command, nodes = ["bash", str(examples / "train.slurm")], slurm_options(examples / "train.slurm")["nodes"]
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": nodes}
    job |= {"OUT": "runs/celeb", "CONFIG": "run.yaml"}
    later, now = (str(int(time.time()) + seconds) for seconds in (3600, 100))
    code, calls = run(command, work, **job, SLURM_JOB_END_TIME=later)
    assert code == 0 and calls["scontrol"][:2] == ["show", "hostnames"]
    launcher = check_command(calls["srun"][calls["srun"].index("torchrun") + 1 :], resume=False)
    assert (launcher.nnodes, launcher.rdzv_endpoint, launcher.rdzv_id) == (nodes, "node7:29500", "41-0")
    begin_run(work)
    code, calls = run(command, work, **job, SLURM_JOB_END_TIME=now, CODE="143", SLURM_RESTART_COUNT="2")
    assert code == 143 and calls["scontrol"] == ["requeue", "41"]
    launcher = check_command(calls["srun"][calls["srun"].index("torchrun") + 1 :], resume=True)
    assert launcher.rdzv_id == "41-2"
    for end, status in ((later, "1"), (now, "0")):  # an error long before the limit; a run that has ended in time
        code, calls = run(command, work, **job, SLURM_JOB_END_TIME=end, CODE=status)
        assert code == int(status) and calls["scontrol"][0] == "show"


@pytest.mark.parametrize("began", [False, True])
def test_kubernetes_job(examples, work, began):
    service, job = yaml.safe_load_all((examples / "kubernetes-job.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    assert (service["apiVersion"], service["kind"]) == ("v1", "Service")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["completions"] == spec["parallelism"] == 2
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy requires it
    name = job["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None" and service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    [container] = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if began:
        begin_run(work)
    for index in ("0", "1"):
        code, calls = run([*container["command"], *container["args"]], work, JOB_COMPLETION_INDEX=index)
        launcher = check_command(calls["torchrun"], resume=began)
        assert code == 0 and int(launcher.nnodes) == spec["completions"]
        port = service["spec"]["ports"][0]["port"]
        assert launcher.rdzv_endpoint == f"{name}-0.{pod['subdomain']}:{port}"
        assert launcher.rdzv_conf == f"is_host={'true' if index == '0' else 'false'}"


@pytest.mark.parametrize("began", [False, True])
def test_kubeflow_trainjob(examples, work, began):
    """Fields of trainer.kubeflow.org/v1alpha1; the whole file was validated once against the schema of the API."""
    job = yaml.safe_load((examples / "kubeflow-trainjob.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    spec, trainer = job["spec"], job["spec"]["trainer"]
    assert spec.keys() == {"runtimeRef", "trainer", "runtimePatches"}
    assert spec["runtimeRef"]["name"] == "torch-distributed"
    assert trainer.keys() == {"image", "numNodes", "numProcPerNode", "command", "args", "env", "resourcesPerNode"}
    assert trainer["resourcesPerNode"]["limits"]["nvidia.com/gpu"] == trainer["numProcPerNode"]
    [patch] = spec["runtimePatches"]
    assert patch.keys() == {"manager", "trainingRuntimeSpec"} and patch["manager"]
    [replicated] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert (replicated["name"], container["name"]) == ("node", "node")  # as the runtime calls them
    assert container.keys() == {"name", "volumeMounts"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    if began:
        begin_run(work)
    [script] = trainer["args"]
    [mount] = [mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "work"]
    assert f"cd {mount}\n" in script
    code, calls = run([*trainer["command"], script.replace(f"cd {mount}\n", "")], work)
    launcher = check_command(calls["torchrun"], resume=began)
    # the runtime sets these through the environment
    assert code == 0 and (launcher.nnodes, launcher.rdzv_endpoint) == ("1:1", "")
