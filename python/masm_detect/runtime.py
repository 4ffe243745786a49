"""Device, threads, precision and determinism of a process, decided in one place."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

import torch

from .config import ConfigError, Precision, RuntimeConfig
from .models.backbone import Backbone


def set_up(runtime: RuntimeConfig) -> torch.device:
    """Apply `runtime` to this process and return the device. Raises ConfigError for a device that is not here."""
    try:
        device = torch.device(runtime.device)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device is {runtime.device!r}; give cpu, cuda or cuda:0") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device is {runtime.device!r}, but this torch {torch.__version__} sees no CUDA device: give cpu, "
            "or install a CUDA build of torch and the driver"
        )
    if runtime.threads is not None:
        torch.set_num_threads(runtime.threads)
    # cuBLAS is deterministic only with a fixed workspace; must be set before its first use.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # warn_only: one CUDA op without a deterministic form (resizing of trained position embeddings) must not forbid
    # "full".
    torch.use_deterministic_algorithms(True, warn_only=True)
    # On by default with the above: a kernel for every torch.empty, to find readers of memory that nobody wrote. There
    # are none here.
    torch.utils.deterministic.fill_uninitialized_memory = False
    return device


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """ "bf16" or "fp32": "auto" is bf16 where the device computes it natively (AVX512-BF16 or AMX; CUDA from
    sm_80).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"


def choose_attention(backbone: Backbone, device: torch.device) -> None:
    """Set how attention is computed on `device`, in training and in scoring alike: eager on the CPU, elsewhere as the
    model has it.

    The backward pass of torch's fused attention is slow on a CPU: a training step of DINOv2-S at 112 px, bf16, took
    61 ms of CPU an image with it and 47 ms without (torch 2.13, one thread).
    """
    if device.type == "cpu":
        backbone.set_attention("eager")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Context of a forward pass in `precision` ("bf16" or "fp32")."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
