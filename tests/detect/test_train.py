"""Training: the schedule, a run folder, and that a killed and resumed run equals an uninterrupted one bit for bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from multiprocessing import active_children
from types import SimpleNamespace

import pytest
import torch
from masm_detect import checkpoint, loop
from masm_detect.checkpoint import CheckpointError
from masm_detect.config import (
    METHODS,
    ConfigError,
    DataConfig,
    OptimConfig,
    RuntimeConfig,
    save_config,
)
from masm_detect.data.images import FrameDataset
from masm_detect.data.records import DatasetError, Sample, read_folder, write_deepfakebench
from masm_detect.errors import UserError
from masm_detect.evaluate import load_run, score_samples
from masm_detect.loop import TrainingError
from masm_detect.methods import Method
from masm_detect.results import read_json
from masm_detect.runtime import set_up
from masm_detect.sources import frame_dataset, limit_frames, load_samples, source_splits, split_by_group
from masm_detect.step_losses import StepLosses
from masm_detect.train import train
from no_waiting import NoWaiting, Waits
from safetensors.torch import load_file
from tiny import die_at, run_config
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from masm_ext import MaskedAdamW, MASMLinear
from masm_ext.adapter import AdapterError
from masm_ext.decomposition import Decomposition


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(str(next((folder / "adapter").glob("*.safetensors"))))


def history(folder) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    measured = {"seconds", "waited", "peak_memory_bytes", "gpu_busy"}
    return [{key: value for key, value in entry.items() if key not in measured} for entry in entries]


def assert_same_run(first, second) -> None:
    left, right = weights(first), weights(second)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert history(first) == history(second)


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


@pytest.fixture
def ctrl_c_is_heard():
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
    tiny_data, tiny_backbone, tmp_path, monkeypatch, capfd, ctrl_c_is_heard, step, workers
):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "whole", "probe"))
    config = run_config(tiny_data, tiny_backbone, tmp_path / "stopped", "probe")
    config = replace(config, runtime=replace(config.runtime, checkpoint_every=0, workers=workers))
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch, pytest.raises(loop.Interrupted, match=f"after step {step + 1}, whose"):
        press_ctrl_c_at(step, patch)
        train(config)
    assert signal.getsignal(signal.SIGINT) is before and capfd.readouterr().err.count("Ctrl-C again") == 1
    assert checkpoint.load(tmp_path / "stopped" / "last")["position"]["step"] == step + 1
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_a_second_ctrl_c_stops_at_once(tiny_data, tiny_backbone, tmp_path, monkeypatch, ctrl_c_is_heard):
    press_ctrl_c_at(3, monkeypatch, times=2)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    assert caught.type is KeyboardInterrupt
    assert checkpoint.load(tmp_path / "run" / "last")["position"]["step"] == 2


@pytest.mark.parametrize("progress", [False, True])
def test_ctrl_c_keeps_its_checkpoint_where_nobody_reads_the_output(tiny_data, tiny_backbone, tmp_path, progress):
    """`masm train ... 2>&1 | tee log`: the reader is stopped by the same Ctrl-C."""
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    save_config(replace(config, runtime=replace(config.runtime, progress=progress, checkpoint_every=0)),
                tmp_path / "run.yaml")  # fmt: skip
    program = (
        "import os, signal, sys; from pathlib import Path; from masm_detect import loop, train; "
        "from masm_detect.config import load_config; real = loop.train_step; count = iter(range(99)); "
        "signal.signal(signal.SIGINT, signal.default_int_handler); "
        "stop = lambda: (os.dup2(closed, 2), os.kill(os.getpid(), signal.SIGINT)); "
        "reader, closed = os.pipe(); os.close(reader); "
        "loop.train_step = lambda *a, **k: (next(count) == 6 and stop(), real(*a, **k))[1]; "
        "train.train(load_config(Path(sys.argv[1])))"
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


class OneStepLate(StepLosses):
    """Losses that arrive as they do on a GPU."""

    def __init__(self):
        super().__init__()
        self.held = []

    def put(self, *arguments):
        arrived, self.held = self.held, super().put(*arguments)
        return arrived

    def drain(self):
        arrived, self.held = self.held, []
        return arrived


@pytest.mark.parametrize("method", ["probe", "masm"])
def test_losses_that_arrive_late_change_nothing(tiny_data, tiny_backbone, tmp_path, monkeypatch, method):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "whole", method))
    monkeypatch.setattr(loop, "StepLosses", OneStepLate)
    train(run_config(tiny_data, tiny_backbone, tmp_path / "late", method))
    assert_same_run(tmp_path / "whole", tmp_path / "late")
    config = run_config(tiny_data, tiny_backbone, tmp_path / "killed", method)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        die_at(7, patch)
        train(config)
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("losses", [StepLosses, OneStepLate])
@pytest.mark.parametrize(
    ("bad", "every", "kept"),
    [(2, 0, None), (4, 0, None), (14, 0, 10), (5, 3, 5), (6, 1, 6), (14, 1, 14)],  # 4 and 14 end an epoch
)
def test_a_loss_that_is_not_finite_is_told_with_its_step(
    tiny_data, tiny_backbone, tmp_path, monkeypatch, losses, bad, every, kept
):
    real, calls = loop.train_step, iter(range(99))

    def breaking(*arguments, **options):
        task, penalty = real(*arguments, **options)
        return task * (float("nan") if next(calls) == bad else 1), penalty

    monkeypatch.setattr(loop, "train_step", breaking)
    monkeypatch.setattr(loop, "StepLosses", losses)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    with pytest.raises(TrainingError, match=f"the loss became nan at step {bad}: lower"):
        train(replace(config, runtime=replace(config.runtime, checkpoint_every=every)))
    last = tmp_path / "run" / "last"
    assert last.exists() == (kept is not None)
    if kept is not None:  # written before the bad step
        assert checkpoint.load(last)["position"]["step"] == kept


def test_a_step_asks_for_no_value():
    """Fake tensors, on the CPU: autograd knows "cuda" only where there is one, and copies to the host are seen there
    only (tests/gpu). The optimizer under masks: tests/optim/test_no_waiting.py.
    """

    class Tiny(nn.Module):
        asks = False

        def __init__(self):
            super().__init__()
            u, s, v = torch.ones(3, 12), torch.ones(3), torch.ones(3, 12)
            self.layer = MASMLinear(Decomposition(torch.ones(12, 12), u, s, v, (0, 1, 2, 3), 0.0))
            self.head = nn.Linear(12, 1)

        def forward(self, images):
            logits = self.head(self.layer(images.flatten(1))).squeeze(-1)
            return logits * logits.max().item() if self.asks else logits

    with FakeTensorMode():
        detector = Tiny()
        optimizer = MaskedAdamW(detector.parameters(), orthogonality=1e-2, spectral_consistency=1e-3)
        method = Method("masm-nomask", optimizer, lambda: sum(optimizer.penalties), None, 0)
        images, labels = torch.zeros(4, 3, 2, 2), torch.zeros(4, dtype=torch.int64)
        options = {"weights": torch.ones(2), "grad_clip": 1.0, "autocast_context": nullcontext()}
        with NoWaiting(warming_up=True):
            loop.train_step(detector, method, images, labels, **options)
        with NoWaiting():
            for _ in range(2):
                losses = loop.train_step(detector, method, images, labels, **options)
            assert [loss.shape for loss in losses] == [(), ()] and not any(loss.requires_grad for loss in losses)
            detector.asks = True
            with pytest.raises(Waits):
                loop.train_step(detector, method, images, labels, **options)


@pytest.mark.parametrize(("every", "kept"), [(2, 6), (0, 5)])
def test_weights_that_are_not_finite_are_never_a_checkpoint(
    tiny_data, tiny_backbone, tmp_path, monkeypatch, every, kept
):
    """A backward pass may overflow where the loss does not: the next loss tells, but the file would be written."""
    real, calls = loop.train_step, iter(range(99))

    def overflowing(detector, *arguments, **options):
        if next(calls) == 7:  # the eighth step
            handle = detector.head.weight.register_hook(lambda grad: grad * float("inf"))
            losses = real(detector, *arguments, **options)
            handle.remove()
            return losses
        return real(detector, *arguments, **options)

    monkeypatch.setattr(loop, "train_step", overflowing)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    message = "the weights are not finite after step 8" if every else "the loss became nan at step 8"
    with pytest.raises(TrainingError, match=message):
        train(replace(config, runtime=replace(config.runtime, checkpoint_every=every)))
    state = checkpoint.load(tmp_path / "run" / "last")
    assert state["position"]["step"] == kept and all(w.isfinite().all() for w in state["weights"].values())


def test_a_step_that_masm_skips_is_not_in_the_mean(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    real, calls = loop.train_step, iter(range(99))

    def breaking(detector, method, images, *arguments, **options):
        return real(detector, method, images * (float("nan") if next(calls) == 1 else 1), *arguments, **options)

    monkeypatch.setattr(loop, "train_step", breaking)
    first, *_ = train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "masm")).fit.history
    assert first["skipped_steps"] == 1 and first["images"] == 20 and 0.3 < first["train_loss"] < 1.5


def test_deterministic_without_filling_memory():
    set_up(RuntimeConfig())
    assert torch.are_deterministic_algorithms_enabled() and not torch.utils.deterministic.fill_uninitialized_memory


def slow_images(monkeypatch, seconds: float) -> None:
    real = FrameDataset.__getitem__

    def slow(*arguments):
        time.sleep(seconds)
        return real(*arguments)

    monkeypatch.setattr(FrameDataset, "__getitem__", slow)


def test_waiting_for_data_is_in_the_time(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    slow_images(monkeypatch, 0.01)
    result = train(run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe"))
    for entry in result.fit.history:
        assert 0.199 <= entry["waited"] < entry["seconds"]  # 20 images
        assert "peak_memory_bytes" not in entry and "gpu_busy" not in entry
    saved = read_json(tmp_path / "run" / "metrics.json")
    assert saved["waited"] == pytest.approx(sum(entry["waited"] for entry in result.fit.history))
    assert saved["seconds"] == pytest.approx(sum(entry["seconds"] for entry in result.fit.history))
    assert saved["images_per_second"] == pytest.approx(60 / saved["seconds"])
    assert saved["peak_memory_bytes"] is saved["gpu_busy"] is None


def test_writing_checkpoints_is_in_the_time(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    real = checkpoint.save

    def slow(*arguments):
        time.sleep(0.05)
        real(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1, batch_size=4))
    [entry] = train(config).fit.history
    assert entry["seconds"] >= entry["waited"] + 0.099  # after steps 2 and 4


def test_the_times_of_a_resumed_epoch_add_up(tiny_data, tiny_backbone, tmp_path, monkeypatch):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        slow_images(patch, 0.05)
        die_at(9, patch)
        train(config)
    before = checkpoint.load(tmp_path / "run" / "last")["position"]
    assert before["batch"] == 3 and 0.599 <= before["waited"] < before["seconds"]
    entry = train(replace(config, resume=True)).fit.history[1]
    assert entry["waited"] > before["waited"] - 1e-3 and entry["seconds"] > before["seconds"]


def test_what_an_epoch_takes_of_a_gpu(monkeypatch):
    resets = []
    monkeypatch.setattr(loop, "Meter", lambda device: SimpleNamespace(busy=lambda: 0.5))
    monkeypatch.setattr(loop, "BusyMean", partial(loop.BusyMean, every=0.0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 77)
    usage = loop._GpuUsage(torch.device("cuda", 1))
    for epoch in range(2):
        usage.start()
        assert len(resets) == epoch + 1
        assert usage.numbers() == {"peak_memory_bytes": 77, "gpu_busy": None}
        usage.sample()
        assert usage.numbers() == {"peak_memory_bytes": 77, "gpu_busy": 0.5}
    history = [{"seconds": 1.0, "gpu_busy": 0.2}, {"seconds": 3.0, "gpu_busy": 0.6}, {"seconds": 9.0, "gpu_busy": None}]
    assert loop._mean_busy(history) == pytest.approx(0.5)
    assert loop._mean_busy([{"seconds": 1.0}]) is None


def test_results_do_not_depend_on_the_workers(tiny_data, tiny_backbone, tmp_path):
    for workers in (None, 0, 2):
        config = run_config(tiny_data, tiny_backbone, tmp_path / str(workers), "probe")
        train(replace(config, runtime=replace(config.runtime, workers=workers)))
    assert_same_run(tmp_path / "None", tmp_path / "0")
    assert_same_run(tmp_path / "None", tmp_path / "2")
    config = run_config(tiny_data, tiny_backbone, tmp_path / "2", "probe", resume=True)
    train(replace(config, runtime=replace(config.runtime, workers=None)))  # not a setting that a run depends on


def test_sigkill_in_another_process(tiny_data, tiny_backbone, tmp_path):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "whole"))
    config = run_config(tiny_data, tiny_backbone, tmp_path / "killed")
    save_config(config, tmp_path / "run.yaml")
    program = (
        "import os, signal, sys; from pathlib import Path; from masm_detect import loop, train; "
        "from masm_detect.config import load_config; real = loop.train_step; count = iter(range(99)); "
        "die = lambda: os.kill(os.getpid(), signal.SIGKILL); "
        "loop.train_step = lambda *a, **k: die() if next(count) == 8 else real(*a, **k); "
        "train.train(load_config(Path(sys.argv[1])))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path / "run.yaml")], env=environment, timeout=120)
    assert done.returncode == -signal.SIGKILL
    train(replace(config, resume=True))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_run_folder_is_complete_and_loads(tiny_data, tiny_backbone, tmp_path):
    for method in ("full", "osf", "masm"):
        out = tmp_path / method
        result = train(run_config(tiny_data, tiny_backbone, out, method))
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert {"config.yaml", "environment.json", "groups.json", "metrics.json", "history.jsonl"} <= names
        assert {"adapter/adapter.json", "last/state.json", "plots/history.png"} <= names
        assert ("plots/masks.png" in names) == ("plots/drift.png" in names) == (method == "masm")
        assert not [name for name in names if name.endswith(".tmp")]
        config, detector = load_run(out)
        _, val = source_splits(config.data)
        scores = [score_samples(d, frame_dataset(val, d.backbone, config.data)) for d in (result.detector, detector)]
        torch.testing.assert_close(*map(torch.from_numpy, scores), rtol=1e-5, atol=1e-6)


def test_learns_and_keeps_the_best_epoch(tiny_data, tiny_backbone, tmp_path):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "full", optim=OptimConfig(epochs=6, batch_size=4))
    result = train(replace(config, method=replace(config.method, lr=3e-3)))
    assert result.fit.best_val_auc == max(entry["val_auc"] for entry in result.fit.history) > 0.9


def test_a_run_folder_is_never_overwritten(tiny_data, tiny_backbone, tmp_path):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1))
    with pytest.raises(ConfigError, match="nothing to resume"):
        train(replace(config, resume=True))
    train(config)
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    with pytest.raises(ConfigError, match=r"runtime\.seed was 5, is 6"):
        train(replace(config, resume=True, runtime=replace(config.runtime, seed=6)))


def test_resume_refuses_another_backbone(tiny_data, tiny_backbone, tmp_path, tiny_detector):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", "probe", optim=OptimConfig(epochs=1))
    train(config)
    tiny_detector(seed=1).backbone.model.save_pretrained(tiny_backbone)
    with pytest.raises(CheckpointError, match="frozen weights are not those"):
        train(replace(config, resume=True))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_fits_its_own_backbone_only(tiny_data, tiny_backbone, tmp_path, tiny_detector, method):
    train(run_config(tiny_data, tiny_backbone, tmp_path / "run", method, optim=OptimConfig(epochs=1, batch_size=12)))
    load_run(tmp_path / "run")
    other = tiny_detector(seed=1).backbone.model
    other.save_pretrained(tiny_backbone)
    with pytest.raises((UserError, AdapterError), match=r"another backbone|base model does not fit"):
        load_run(tmp_path / "run")
    # Only a layer that no method but "full" trains is another one.
    same = tiny_detector().backbone.model
    same.layernorm.weight.data.mul_(1.001)
    same.save_pretrained(tiny_backbone)
    with pytest.raises((UserError, AdapterError), match=r"another backbone|1 of its tensors.*layernorm\.weight"):
        load_run(tmp_path / "run")


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


def test_history_has_no_nan(tmp_path):
    loop.write_history(tmp_path, [{"epoch": 0, "train_loss": float("nan")}])
    assert (tmp_path / "history.jsonl").read_text() == '{"epoch": 0, "train_loss": null}\n'


def test_a_group_in_several_splits_is_refused(tiny_data, tmp_path):
    """As the published DeepfakeBench files have it: the test videos again, as val."""
    samples = read_folder(tiny_data)
    side = {"train": lambda n: n < 8, "val": lambda n: n >= 8, "test": lambda n: n >= 8}
    for leak in (("train", "val", "test"), ("train", "test", "test")):
        parts = [
            replace(s, split=name, path=s.path if i < 2 else f"{s.path}-copy")
            for i, name in enumerate(("train", "val", "test"))
            for s in samples
            if side[leak[i]](int(s.path[-6:-4]))
        ]
        for s in parts:
            if s.path.endswith("-copy"):
                shutil.copy(s.path.removesuffix("-copy"), s.path)
        write_deepfakebench(parts, tmp_path / "leak.json")
        config = DataConfig(paths=[str(tmp_path / "leak.json")])
        with pytest.raises(DatasetError, match=r"in \['test', 'val'\].*repeat the test videos as val.*data\.splits"):
            source_splits(config)
        train_part, val_part = source_splits(replace(config, splits=["train"]))
        assert not {s.group for s in train_part} & {s.group for s in val_part}
        assert {s.split for s in (*train_part, *val_part)} == {"train", "val"}


def test_paths_of_one_name_do_not_merge(tiny_data, tmp_path):
    shutil.copytree(tiny_data, tmp_path / "other" / "data")
    with pytest.raises(DatasetError, match="'data/fake-stripes/00', and would be taken for one: rename"):
        load_samples([str(tiny_data), str(tmp_path / "other" / "data")])
    with pytest.raises(ConfigError, match="given twice"):
        load_samples([str(tiny_data), str(tiny_data)])
    samples = read_folder(tiny_data)
    names = [str(tmp_path / f"{part}.json") for part in ("train", "val")]
    for name, part in zip(names, (samples[::2], samples[1::2])):
        write_deepfakebench(part, name)
    assert len(load_samples(names)) == 24  # one data set in two files, no video in both
    fakes = tmp_path / "more" / "data" / "fake-other"
    fakes.mkdir(parents=True)
    shutil.copy(samples[0].path, fakes / "x.png")
    with pytest.raises(DatasetError, match="both hold the data set 'data'"):
        load_samples([str(tiny_data), str(fakes.parent)])


def test_static_masks_choose_layers(tiny_data, tiny_backbone, tmp_path):
    config = run_config(tiny_data, tiny_backbone, tmp_path / "run", optim=OptimConfig(epochs=1, batch_size=4))
    options = replace(config.method.masm, mask_policy="static", mask_active_fraction=0.25)
    result = train(replace(config, method=replace(config.method, masm=options)))
    assert len(result.fit.history[-1]["drift"]) == 2  # of 8 attention projections
    load_run(tmp_path / "run")


def test_one_cycle():
    rates = [loop.one_cycle(step, 100, 0.1, 0.01) for step in range(100)]
    assert max(rates) == pytest.approx(1.0) and rates.index(max(rates)) == 10
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01) and rates[0] > 0
    assert loop.one_cycle(0, 1, 0.0, 0.0) == 1.0


def test_order_is_a_function_of_seed_and_epoch():
    assert sorted(loop.epoch_order(9, 0, 0)) == list(range(9))
    assert loop.epoch_order(50, 0, 1) == loop.epoch_order(50, 0, 1)
    assert len({tuple(loop.epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_class_balance():
    weights_ = loop.class_weights([0, 0, 0, 1], balance=True)
    torch.testing.assert_close(weights_, torch.tensor([4 / 6, 2.0]))
    assert loop.class_weights([0, 1], balance=False).tolist() == [1, 1]


def sample(group: str, label: int, index: int = 0, split: str = "") -> Sample:
    return Sample(f"{group}-{index}", label, "d", "f" if label else "real", f"d/{label}/{group}", split, group)


def test_split_keeps_groups_and_classes_together():
    samples = [sample(f"{label}-{group}", label, i) for label in (0, 1) for group in range(10) for i in range(3)]
    shared = [sample(f"photo-{group}", label) for label in (0, 1) for group in range(5)]
    for data in (samples, shared):
        done = split_by_group(data, 0.2, seed=1)
        sides = {side: {s.group for s in done if s.split == side} for side in ("train", "val")}
        assert not sides["train"] & sides["val"]
        assert all({s.label for s in done if s.split == side} == {0, 1} for side in sides)
    kept = split_by_group([*samples, sample("x", 0, split="val"), sample("y", 1, split="test")], 0.2, seed=1)
    assert {s.split for s in kept[:-2]} == {"train"} and [s.split for s in kept[-2:]] == ["val", "test"]
    with pytest.raises(ConfigError, match=r"1 real group"):
        split_by_group([sample("a", 0), sample("b", 1), sample("c", 1)], 0.5, seed=0)


def test_frames_are_spread_evenly():
    samples = [sample("v", 0, index) for index in range(10)]
    assert [s.path for s in limit_frames(samples, 4)] == ["v-0", "v-3", "v-6", "v-9"]
    assert limit_frames(samples, None) == samples and limit_frames(samples, 99) == samples
