"""A killed and resumed run equals an uninterrupted one bit for bit; a run that changed is not resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from command_line import code_of
from masm_detect.config import ConfigError, OptimConfig
from masm_detect.config_files import save_config
from masm_detect.errors import CheckpointError, UserError
from masm_detect.training import loop
from masm_detect.training.run import train
from run_folders import assert_same_run
from tiny import die_at, run_config


@pytest.mark.parametrize("method", ["probe", "lora", "effort", "masm"])
@pytest.mark.parametrize("step", [1, 7, 10])
def test_killed_and_resumed_equals_uninterrupted(tiny_data, tiny_backbone, tmp_path, monkeypatch, method, step):
    # 20 training images in batches of 4: 5 steps an epoch. Step 7 is in the middle of epoch 1, right after no
    # checkpoint; step 10 is the first of epoch 2; at step 1 there is no checkpoint yet.
    whole = train(run_config(tiny_data, tiny_backbone, tmp_path / "whole", method))
    config = run_config(tiny_data, tiny_backbone, tmp_path / "killed", method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(step, patch)
        train(config)
    torch.manual_seed(999)
    resumed = train(replace(config, resume=True))
    assert resumed.fit.steps == whole.fit.steps == 15
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    if method == "masm":
        assert resumed.fit.mask_history == whole.fit.mask_history != []


def test_sigkill_in_another_process(tiny_data, tiny_backbone, tmp_path):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "whole"))
    config = run_config(tiny_data, tiny_backbone, tmp_path / "killed")
    save_config(config, tmp_path / "run.yaml")
    program = (
        "import os, signal, sys; from pathlib import Path; from masm_detect.training import loop, run; "
        "from masm_detect.config_files import load_config; real = loop.train_step; count = iter(range(99)); "
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL); "
        "loop.train_step = lambda *a, **k: die() if next(count) == 8 else real(*a, **k); "
        "run.train(load_config(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run.yaml")], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_run_folder_is_never_overwritten(tiny_data, tiny_backbone, tmp_path):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1))
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(replace(config, resume=True))
    train(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    with pytest.raises(ConfigError, match=r"runtime\.seed was 5, is 6"):
        train(replace(config, resume=True, runtime=replace(config.runtime, seed=6)))


def test_resuming_a_finished_run_says_so_and_changes_nothing(tiny_data, tiny_backbone, tmp_path, capsys):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1))
    before = train(config)
    assert "no epoch is left to train" not in "".join(capsys.readouterr())
    shown = replace(config.runtime, progress=True)
    after = train(replace(config, resume=True, runtime=shown))
    assert "the run was finished before: no epoch is left to train" in capsys.readouterr().err
    assert after.fit.history == before.fit.history


@pytest.mark.parametrize("method", ["lora", "masm"])
def test_a_run_of_a_version_without_a_setting_resumes_as_it_was(
    tiny_data, tiny_backbone, tmp_path, monkeypatch, method
):
    def configured(name):
        config = run_config(tiny_data, tiny_backbone, tmp_path / name, method)
        masm = replace(config.method.masm, lift=0.5)
        return replace(config, method=replace(config.method, masm=masm, u_lr_scale=1.0, v_lr_scale=1.0))

    train(configured("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(configured("killed"))
    saved = tmp_path / "killed" / "config.yaml"
    lines = saved.read_text().splitlines(keepends=True)
    assert sum("_lr_scale" in line for line in lines) == 2
    saved.write_text("".join(line for line in lines if "_lr_scale" not in line))
    assert code_of(["train", "--out", str(tmp_path / "killed"), "--resume"]) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_resume_refuses_another_backbone(tiny_data, tiny_backbone, tmp_path, tiny_detector):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1))
    train(config)
    tiny_detector(seed=1).backbone.model.save_pretrained(tiny_backbone)
    with pytest.raises(CheckpointError, match="frozen weights are not those"):
        train(replace(config, resume=True))


@pytest.mark.parametrize("change", ["more bytes", "new image", "gone", "root", "precision", "threads"])
def test_resume_notices_what_changed(tiny_data, tiny_backbone, tmp_path, monkeypatch, change):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1))
    train(config)
    message = "data changed"
    picture = tiny_data / "real" / "03.png"
    if change == "more bytes":
        picture.write_bytes(picture.read_bytes() + b"\0")
    elif change == "new image":
        shutil.copy(picture, tiny_data / "real" / "99.png")
    elif change == "gone":
        picture.unlink()
    elif change == "root":
        config, message = replace(config, data=replace(config.data, root="elsewhere")), "data.root was None"
    elif change == "precision":
        monkeypatch.setattr(loop, "resolve_precision", lambda *_: "bf16")
        message = "it ran in fp32, here it would run in bf16"
    else:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
        message = r"are 77.*--runtime\.threads="
    with pytest.raises(UserError, match=message):
        train(replace(config, resume=True))
