"""The machine: what it is, and what it can do at best."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path
from typing import Any

import torch
from bench import Call, interleave, load_average
from cases import DTYPES
from masm_detect.provenance import cpu_field, git_state, provenance

from masm_ext import _library, build_info

ROOT = Path(__file__).resolve().parents[2]
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16")
_FLAGS += ("amx_tile", "amx_bf16", "amx_fp16", "asimd", "sve", "bf16", "i8mm")


def describe(device: torch.device) -> dict[str, Any]:
    """`masm_detect.provenance.provenance`, and what else decides a timing: CPU flags, caches, threads, load, the state
    of the whole source tree and the SHA-256 of the compiled library. No path, no host name.
    """
    record = provenance(str(device))
    # Results are written into the tree: they do not make a build another one.
    record["git"] = git_state(ROOT, ".", ":!benchmarks/speed/results")
    record["load_average"] = load_average()
    record["cpu"] = {
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in cpu_field("flags", "Features").split()],
        "cache": cpu_field("cache size") or None,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "machine": platform.machine(),
    }
    record["environment"] = {
        name: os.environ[name]
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "KMP_AFFINITY", "ONEDNN_MAX_CPU_ISA")
        if name in os.environ
    }
    record["libraries_sha256"] = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in (_library.CPU_LIBRARY, _library.CUDA_LIBRARY)
        if path is not None
    }
    record["ops"] = build_info()["ops"]
    if device.type == "cuda":
        record["device"] |= {"memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    return record


def ceilings(device: torch.device, dtypes: tuple[str, ...], seconds: float, small: bool = False) -> dict[str, Any]:
    """What a plain product and a plain copy reach here: {dtype: {"flops": FLOP/s, "bytes": bytes/s, ...}}.

    The fastest round counts, because a ceiling is wanted: of `torch.mm` on square matrices and of `Tensor.copy_`, which
    reads and writes every byte.
    """
    n, size = (8192, 1 << 30) if device.type == "cuda" else (2048, 256 << 20)
    if small:
        n, size = n // 4, size // 4
    table = {}
    for name in dtypes:
        dtype = DTYPES[name]
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        c = torch.empty_like(a)
        source = torch.zeros(size // dtype.itemsize, dtype=dtype, device=device)
        target = torch.empty_like(source)
        calls = {"gemm": Call(lambda a=a, b=b, c=c: torch.mm(a, b, out=c))}
        calls["copy"] = Call(lambda s=source, t=target: t.copy_(s))
        best = {key: min(values) for key, values in interleave(calls, device, seconds).items()}
        table[name] = {
            "flops": 2 * n**3 / best["gemm"],
            "bytes": 2 * size / best["copy"],
            "gemm": f"{n} x {n} x {n}",
            "copy_bytes": size,
        }
    return table
