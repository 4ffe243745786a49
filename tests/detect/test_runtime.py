"""The settings of torch that a run makes, and that they end with it."""

from __future__ import annotations

import os

import pytest
import torch
from masm_detect import runtime
from masm_detect.config import ConfigError, EvalConfig, OptimConfig, RuntimeConfig
from masm_detect.evaluation.evaluate import evaluate
from masm_detect.runtime import process_settings, resolve_device, resolve_precision
from masm_detect.training import loop
from masm_detect.training.run import train
from tiny import run_config


def settings() -> dict:
    return {
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.fixture(params=["torch's own", "the caller's"])
def before(request, monkeypatch) -> dict:
    """Settings of a caller, e.g. a notebook."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    if request.param == "the caller's":
        torch.set_num_threads(3)
        torch.use_deterministic_algorithms(True)
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    return settings()


def test_deterministic_without_filling_memory(before):
    with process_settings(RuntimeConfig(device="cpu", threads=2)) as device:
        assert device == torch.device("cpu")
        inside = settings()
    workspace = before["workspace"] or ":4096:8"
    expected = {"threads": 2, "deterministic": True, "warn_only": True, "fill": False, "workspace": workspace}
    assert inside == expected
    assert settings() == before


def test_settings_are_restored_after_an_error(before):
    with pytest.raises(KeyboardInterrupt), process_settings(RuntimeConfig(device="cpu", threads=2)):
        raise KeyboardInterrupt
    with pytest.raises(ConfigError), process_settings(RuntimeConfig(device="abacus", threads=2)):
        pass
    assert settings() == before


def test_train_and_evaluate_leave_the_settings_of_the_caller(before, tiny_data, tiny_backbone, tmp_path, monkeypatch):
    runtime = RuntimeConfig(threads=2, progress=False)
    config = run_config(
        tiny_data,
        tiny_backbone,
        tmp_path / "run",
        "probe",
        optim=OptimConfig(epochs=1, batch_size=12),
        runtime=runtime,
    )
    real, inside = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: (inside.append(settings()), real(*a, **k))[1])
    train(config)
    assert inside[0]["threads"] == 2 and inside[0]["deterministic"]
    assert settings() == before
    evaluate(EvalConfig([config.out], [str(tiny_data)], out=str(tmp_path / "eval"), runtime=runtime))
    assert settings() == before


def test_auto_takes_a_gpu_if_there_is_one(monkeypatch):
    for available, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert resolve_device(RuntimeConfig().device).type == kind


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mps", "runtime.device is 'mps', but masm_ext has operators for the CPU and for NVIDIA GPUs"),
        ("gpu", "runtime.device is 'gpu'; give auto, cpu, cuda or cuda:0"),
        ("cuda", "sees no CUDA device"),
    ],
)
def test_a_device_that_cannot_serve_is_refused(name, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        resolve_device(name)


@pytest.mark.parametrize(
    ("features", "vendor", "expected"),
    [
        ({"avx512_bf16": True}, "AuthenticAMD", "bf16"),
        ({"avx512_bf16": True}, "GenuineIntel", "fp32"),
        ({"avx512_bf16": True, "amx_bf16": True}, "GenuineIntel", "bf16"),
        ({}, "AuthenticAMD", "fp32"),
    ],
)
def test_auto_precision_is_bf16_where_a_cpu_is_fast_at_it(monkeypatch, features, vendor, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.setattr(runtime, "cpu_field", lambda *_: vendor)
    cpu = torch.device("cpu")
    assert resolve_precision("auto", cpu) == expected
    assert (resolve_precision("bf16", cpu), resolve_precision("fp32", cpu)) == ("bf16", "fp32")
