"""masm_detect on a GPU: a run goes on bit for bit, its batches are those of a CPU, and no step waits for the device."""

from dataclasses import replace
from math import isfinite

import pytest
import torch

pytest.importorskip("masm_detect.training.run", reason="needs the extra masm_ext[detect]")
import tiny
from masm_detect.data.frames import frame_dataset
from masm_detect.data.loading import Batches, in_order
from masm_detect.data.sources import source_splits
from masm_detect.evaluation.runs import load_run
from masm_detect.gpu import Meter
from masm_detect.methods.build import build_method
from masm_detect.runtime import autocast, process_settings
from masm_detect.training import loop
from masm_detect.training.run import train
from masm_detect.training.step_losses import StepLosses

pytestmark = pytest.mark.gpu


@pytest.fixture
def config(tmp_path, device):
    """`config(name)`: a run of that name."""
    data, backbone = tiny.write_data(tmp_path / "data"), tmp_path / "backbone"
    tiny.detector().backbone.model.save_pretrained(backbone)

    def build(name, method="masm"):
        made = tiny.run_config(data, backbone, tmp_path / name, method)
        runtime, optim = replace(made.runtime, device=str(device)), replace(made.optim, epochs=2)
        return replace(made, runtime=runtime, optim=optim)

    return build


def test_a_killed_run_goes_on_bit_for_bit(config, device, monkeypatch):
    whole = train(config("whole"))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        tiny.die_at(7, patch)
        train(config("killed"))
    resumed = train(replace(config("killed"), resume=True))
    assert resumed.fit.mask_history == whole.fit.mask_history != []
    for a, b in zip(whole.detector.state_dict().values(), resumed.detector.state_dict().values(), strict=True):
        assert a.device.type == device.type and torch.equal(a, b)
    if device.type == "cuda":
        assert all(entry["peak_memory_bytes"] > 0 for entry in whole.fit.history)
    _, loaded = load_run(config("whole").out, device)
    images = torch.randn(3, 3, 28, 28, device=device)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), whole.detector.eval()(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [None, 0, 2])
def test_batches_are_those_of_a_cpu(config, device, workers):
    made = config("run")
    samples, _ = source_splits(made.data)
    dataset = frame_dataset(samples, tiny.detector().backbone, made.data, augment=True)
    indices = in_order(len(dataset), 3)
    for got, want in zip(Batches(dataset, indices, device, workers), Batches(dataset, indices, torch.device("cpu"), 0)):
        for a, b in zip(got, want):
            assert a.device.type == device.type and torch.equal(a.cpu(), b)


@pytest.mark.parametrize("method", ["probe", "full", "lora", "effort", "masm"])
def test_no_step_waits_for_the_device(config, device, gpu_only, method):
    made = config("run", method)
    with process_settings(made.runtime):
        detector = tiny.detector().to(device)
        built = build_method(method, detector, made.method, 0)
        images, labels = torch.randn(4, 3, 28, 28, device=device), torch.tensor([0, 1, 1, 0], device=device)
        losses, weights = StepLosses(), torch.ones(2, device=device)

        def step(number):
            context = autocast("bf16", device)
            options = {"weights": weights, "optim": made.optim, "autocast_context": context}
            given = loop.train_step(detector, built, images, labels, **options)
            return losses.put(number, len(labels), *given)

        for number in range(20):  # kernels are compiled, tiles timed, masks chosen
            step(number)
        torch.cuda.set_sync_debug_mode("error")
        try:
            arrived = [loss for number in range(20, 40) for loss in step(number)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        arrived += losses.drain()
        assert [loss.step for loss in arrived] == list(range(19, 40))
        assert all(isfinite(loss.task) and isfinite(loss.penalty) for loss in arrived)


def test_the_meter_answers(device, gpu_only):
    pytest.importorskip("pynvml", reason="needs nvidia-ml-py")
    meter = Meter(device)
    assert meter.driver()
    busy = meter.busy()
    assert busy is None or 0 <= busy <= 1
