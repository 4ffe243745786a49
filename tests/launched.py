"""`masm` in several processes that torchrun starts."""

from __future__ import annotations

import os
import subprocess
import sys


def launch(processes: int, *arguments: str, restarts: int = 0) -> subprocess.Popen:
    """`masm` with these arguments in so many processes, each with one thread and without a GPU."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [*launcher, f"--max-restarts={restarts}", "-m", "masm_detect", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def finished(process: subprocess.Popen, seconds: float = 180) -> str:
    """What a launched command printed, when it has ended without an error."""
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, text
    return text


def workers_of(launcher: int) -> list[int]:
    """The processes that a launcher has started, in their order."""
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True).stdout.split()
    return sorted(int(number) for number in found)
