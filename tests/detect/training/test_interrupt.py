"""Ctrl-C ends a run after the current step, with a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from multiprocessing import active_children

import pytest
from masm_detect.config_files import save_config
from masm_detect.training import checkpoint, loop
from masm_detect.training.interrupt import Interrupted
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import run_config


@pytest.fixture
def ctrl_c_is_handled():
    """Also where the tests run in the background of a script, whose jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def press_ctrl_c_at(step: int, monkeypatch, times: int = 1) -> None:
    """The user presses Ctrl-C while update number `step` is made."""
    real, calls = loop.train_step, iter(range(10**6))

    def pressing(*arguments, **options):
        for _ in range(times if next(calls) == step else 0):
            for process in (os.getpid(), *(child.pid for child in active_children())):  # as a terminal does it
                os.kill(process, signal.SIGINT)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", pressing)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("step", [0, 6, 9])  # the first, in the middle, and the last of an epoch
def test_ctrl_c_ends_with_a_checkpoint(
    tiny_data, tiny_backbone, tmp_path, monkeypatch, capfd, ctrl_c_is_handled, step, workers
):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "whole", "probe"))
    config = run_config(tiny_data, tiny_backbone, tmp_path / "stopped", "probe")
    config = replace(config, runtime=replace(config.runtime, checkpoint_every=0, workers=workers))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=f"after step {step + 1}, whose"):
        press_ctrl_c_at(step, patch)
        train(config)
    assert signal.getsignal(signal.SIGINT) is before and capfd.readouterr().err.count("Ctrl-C again") == 1
    assert checkpoint.load(tmp_path / "stopped" / "last")["position"]["step"] == step + 1
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_at_once(tiny_data, tiny_backbone, tmp_path, monkeypatch, ctrl_c_is_handled):
    press_ctrl_c_at(3, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    assert caught.type is KeyboardInterrupt
    assert checkpoint.load(tmp_path / "run" / "last")["position"]["step"] == 2


def test_sigterm_twice_ends_with_a_checkpoint(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    """As from SLURM and from torchrun; the process may be between two steps or in one."""
    before, real = signal.signal(signal.SIGTERM, signal.SIG_DFL), loop.train_step

    def signalled(*arguments, **options):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", signalled)
    try:
        with pytest.raises(Interrupted, match="after step 1, whose"):
            train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert checkpoint.load(tmp_path / "run" / "last")["position"]["step"] == 1


@pytest.mark.parametrize("progress", [False, True])
def test_ctrl_c_keeps_its_checkpoint_if_the_output_is_closed(tiny_data, tiny_backbone, tmp_path, progress):
    """`masm train ... 2>&1 | tee log`: the reader is stopped by the same Ctrl-C."""
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    save_config(replace(config, runtime=replace(config.runtime, progress=progress, checkpoint_every=0)),
                tmp_path / "run.yaml")  # fmt: skip
    program = (
        "import os, signal, sys; from pathlib import Path; from masm_detect.training import loop, run; "
        "from masm_detect.config_files import load_config; real = loop.train_step; count = iter(range(99)); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "stop = lambda: (os.dup2(closed, 2), os.kill(os.getpid(), signal.SIGINT)); "
        "reader, closed = os.pipe(); os.close(reader); "
        "loop.train_step = lambda *a, **k: (next(count) == 6 and stop(), real(*a, **k))[1]; "
        "run.train(load_config(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "run.yaml")], env=environment, timeout=120,
                   stderr=subprocess.PIPE)  # fmt: skip
    assert checkpoint.load(tmp_path / "run" / "last")["position"]["step"] == 7


@pytest.mark.parametrize("other", [signal.SIG_IGN, lambda *_: None], ids=["ignored", "the caller's"])
def test_a_ctrl_c_that_means_something_else_is_left_alone(tiny_data, tiny_backbone, tmp_path, monkeypatch, other):
    before = signal.signal(signal.SIGINT, other)
    try:
        press_ctrl_c_at(3, monkeypatch)
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
        assert signal.getsignal(signal.SIGINT) is other
    finally:
        signal.signal(signal.SIGINT, before)
