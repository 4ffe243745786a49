"""The host's cost of a call, and that a replay starts what the recorded call started."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="Triton is not installed (it has no build for this platform?)")

#: A process of its own: Triton keeps what it has seen of a driver. Prints, for a call that is planned and the same call
#: replayed, what each launch was given; addresses as (which argument or result, offset), or, in memory that
#: the call had for itself, (which of its allocations by first use, offset). Ends with how much memory the plans keep.
PROGRAM = """
import gc, json, sys
import torch
import host
from masm_ext.kernels import launch_plan, subspace_linear
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.tools.tensor_descriptor import TensorDescriptor

class Keeping(TorchDispatchMode):
    # nothing is given back, so that no address is used twice

    def __init__(self):
        super().__init__()
        self.kept = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        returned = func(*args, **(kwargs or {}))
        self.kept += [t for t in tree_leaves(returned) if isinstance(t, torch.Tensor)]
        return returned

def draw(J, M=80, N=64, D=64, R=16):
    def each(*shape, dtype=torch.bfloat16):
        return list(torch.randn(J, *shape).to(dtype).unbind(0))
    u, s, v = each(R, N, dtype=torch.float32), each(R, dtype=torch.float32), each(R, D, dtype=torch.float32)
    return torch.randn(M, D).bfloat16(), each(N, D), u, s, v, each(N), [torch.ones(2, dtype=torch.bool)] * J, each(M, N)

def seen(started, given, kept):
    own = []

    def place(address):
        for i, t in enumerate(given):
            if t.data_ptr() <= address < t.data_ptr() + t.numel() * t.itemsize:
                return [i, address - t.data_ptr()]
        [first] = {s.data_ptr() for s in (t.untyped_storage() for t in kept)
                   if s.data_ptr() <= address < s.data_ptr() + s.nbytes()}
        if first not in own:
            own.append(first)
        return ["own", own.index(first), address - first]
    def of(value):
        if isinstance(value, (TensorDescriptor, torch.Tensor)):
            base = value.base if isinstance(value, TensorDescriptor) else value
            rest = [list(value.shape), list(value.strides), list(value.block_shape)] if base is not value else []
            return [place(base.data_ptr()) if base is not value or value.numel() else None, *rest]
        if isinstance(value, int) and value > 1 << 32:
            return [place(value)]
        return [None] if value is None else str(value)
    return [[name, grid, [of(a) for a in arguments]] for name, grid, arguments in started]

with host.cuda_on_the_cpu() as stand_in:
    out, storages = [], []
    for J in (1, 3):
        for strategy in ("kext", "single"):
            runs = []
            for i in range(4):
                x, w, u, s, v, b, mask, dy = draw(J)
                mask = mask if J == 1 else []
                stand_in.started = []
                with Keeping() as keeping:
                    y, p = subspace_linear.subspace_linear_group(x, w, u, s, v, b, mask, [0, 8, 16], True, strategy)
                    grads = subspace_linear.subspace_linear_group_backward(
                        dy, x, w, u, s, v, p, mask, [0, 8, 16], True, True, True, True, True, strategy)
                given = [x, *w, *u, *s, *v, *b, *mask, *dy, p, *y, *grads]
                runs.append(seen(stand_in.started, given, keeping.kept))
                storages += [StorageWeakRef(t.untyped_storage()) for t in given + keeping.kept]
            out.append(runs)
    assert sum(isinstance(t, launch_plan.LaunchPlan) for t in launch_plan._plans.values()) == 8
    del x, w, u, s, v, b, mask, dy, y, p, grads, given, keeping
    stand_in.started = None
    gc.collect()
    print(json.dumps([out, sum(not storage.expired() for storage in storages)]))
"""


def test_a_replay_starts_what_the_call_started(repo):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM],
        cwd=repo / "benchmarks/gpu_model", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    calls, kept = json.loads(done.stdout.splitlines()[-1])
    for planned, recorded, *replayed in calls:
        assert len(planned) >= 4 and planned == recorded and '"own"' in json.dumps(planned)
        for run in replayed:
            assert run == planned
    assert kept == 0, f"{kept} tensors are kept alive by plans"


def test_the_command_prints_and_writes_every_case(repo, tmp_path):
    out = tmp_path / "host.json"
    command = [sys.executable, "host.py", "--seconds", "0.2", "--out", str(out)]
    done = subprocess.run(command, cwd=repo / "benchmarks/gpu_model", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Overriding" not in done.stderr
    saved = json.loads(out.read_text())
    for table in saved["seconds"].values():
        assert {"frozen", "masm-single", "masm-kext, planned anew", "effort", "masm-group, three"} <= set(table)
        assert all(entry["median"] > 0 and entry["ratio"]["median"] > 0 for entry in table.values())
        assert all(f"| {name} |" in done.stdout for name in table)
