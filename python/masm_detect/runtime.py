"""Device, threads, precision and determinism of a run, decided in one place."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from .config import ConfigError, Precision, RuntimeConfig
from .launch import is_launched, local_rank
from .models.backbone import Backbone
from .provenance import cpu_field

#: cuBLAS is deterministic only with a fixed workspace; read before its first use.
_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"


@contextmanager
def process_settings(runtime: RuntimeConfig) -> Iterator[torch.device]:
    """Context with the threads and the determinism of a run; gives its device, and restores torch's settings at exit.

    Raises:
        ConfigError: the device does not exist on this machine.
    """
    device = resolve_device(runtime.device)
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    workspace = os.environ.get(_CUBLAS)
    try:
        if runtime.threads is not None:
            torch.set_num_threads(runtime.threads)
        if workspace is None:
            os.environ[_CUBLAS] = ":4096:8"
        # warn_only: the resizing of trained position embeddings has no deterministic CUDA kernel, and "full" needs it.
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Determinism turns this on: a fill kernel for every torch.empty, which only readers of unwritten memory need.
        torch.utils.deterministic.fill_uninitialized_memory = False
        yield device
    finally:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        if workspace is None:
            os.environ.pop(_CUBLAS, None)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def resolve_device(name: str) -> torch.device:
    """The device called `name`; "auto" is cuda if torch sees a GPU, else cpu. A launched process gets its own GPU.

    Raises:
        ConfigError: no such device on this machine, or one without operators of `masm_ext`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and is_launched():  # each process of a launcher has a GPU of its own
        name = f"cuda:{local_rank()}"
    elif is_launched() and name.startswith("cuda:"):
        raise ConfigError(
            f"runtime.device is {name!r}, but each process of a launcher has its own GPU: give cuda or auto"
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"runtime.device is {name!r}; give auto, cpu, cuda or cuda:0") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"runtime.device is {name!r}, but masm_ext has operators for the CPU and for NVIDIA GPUs (cuda) only: give "
            "auto or cpu"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"runtime.device is {name!r}, but this torch {torch.__version__} sees no CUDA device: give cpu, or install "
            "a CUDA build of torch and the driver"
        )
    return device


def resolve_precision(precision: Precision, device: torch.device) -> str:
    """The precision "bf16", "fp16" or "fp32"; "auto" is bf16 where the device is fast at it, else fp32.

    That is a GPU from CUDA sm_80 on, and a CPU with AMX, or with AVX512-BF16 if it is not Intel's: of an Intel CPU that
    has AVX512-BF16 but no AMX, torch's bf16 product was half as fast as its fp32 product (78 against 150 GFLOP/s in
    one thread, torch 2.13, timed once); of an AMD CPU it was twice as fast (420 against 194, two threads).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    if capabilities.get("amx_bf16"):
        return "bf16"
    return "bf16" if capabilities.get("avx512_bf16") and cpu_field("vendor_id") != "GenuineIntel" else "fp32"


def choose_attention(backbone: Backbone, device: torch.device) -> None:
    """Compute attention eagerly on the CPU, in training and scoring; other devices keep the model's own choice.

    The backward pass of torch's fused attention is slow on a CPU: a training step of DINOv2-S at 112 px, bf16, took
    61 ms per image with it and 47 ms without (torch 2.13, one thread).
    """
    if device.type == "cpu":
        backbone.set_attention("eager")


def autocast(precision: str, device: torch.device) -> AbstractContextManager:
    """Context of a forward pass in `precision` ("bf16", "fp16" or "fp32")."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)
