"""GradScaler and gradient accumulation with MaskedAdamW, in one process and under DistributedDataParallel."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
import scaling_worker as worker


def alone(seed, steps=range(worker.STEPS), parts=1):
    """One process on whole batches."""
    model, optimizer = worker.build(seed)
    for step in steps:
        for part in range(parts):
            size = 16 // parts
            (worker.loss_of(model, seed, step, slice(part * size, (part + 1) * size)) / parts).backward()
        optimizer.step()
        optimizer.zero_grad()
    return worker.outcome(model, optimizer)


def check_close(found, expected):
    assert found.keys() >= expected.keys()
    for key, value in expected.items():
        if value.is_floating_point() and key != "selected":
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=2e-6, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(found[key], value), key


def test_accumulated_gradients_are_those_of_the_whole_batch(seed):
    seed %= 2**16
    whole = alone(seed)
    assert (whole["selected"] == 0).any() and (whole["selected"] == 1).any()
    check_close(alone(seed, parts=4), whole)


@pytest.fixture(scope="module")
def ranks(request, tmp_path_factory):
    value = request.config.getoption("--seed")
    seed = int.from_bytes(os.urandom(2), "little") if value is None else value % 2**16
    print(f"processes with --seed {seed}")
    folder = tmp_path_factory.mktemp("ddp")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, worker.__file__, str(folder), str(rank), str(seed)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text[-3000:]
    return seed, lambda name: [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def test_accumulation_without_communication(ranks):
    seed, load = ranks
    a, b = load("accumulate")
    assert all(torch.equal(a[key], b[key]) for key in a)
    check_close(a, alone(seed))


def test_all_processes_skip_the_same_step(ranks):
    """The overflow is in one process only; the run is that of one process without the batch."""
    seed, load = ranks
    a, b = load("overflow")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert a["skipped"] == 1 and a["scale"] == 2.0**9
    expected = alone(seed, [step for step in range(worker.STEPS) if step != worker.OVERFLOW])
    check_close(a, expected | {"skipped": torch.tensor(1)})


@pytest.mark.parametrize("clip", [None, 0.05], ids=["not clipped", "clipped"])
def test_a_skipped_step_changes_nothing(seed, clip):
    """A scale that is a power of two changes no bit, and neither do skipped steps in between."""
    seed %= 2**16
    runs = []
    for scaled in (False, True):
        model, optimizer = worker.build(seed)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=scaled)
        clipped = 0
        for step in range(worker.STEPS):
            if scaled and step in (2, 6, 7):
                before = worker.outcome(model, optimizer)
                loss = worker.loss_of(model, seed, 1000 + step, slice(0, 16))
                scaler.scale(loss).backward()
                model[0].u.grad[1, 3] = torch.nan if step == 7 else -torch.inf
                if clip is not None:
                    scaler.unscale_(optimizer)
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                after = worker.outcome(model, optimizer)
                assert after.pop("skipped") == before.pop("skipped") + 1
                assert all(torch.equal(after[key], before[key]) for key in before)
            scaler.scale(worker.loss_of(model, seed, step, slice(0, 16))).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                clipped += nn.utils.clip_grad_norm_(model.parameters(), clip) > clip
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert clip is None or clipped > 0
        assert not scaled or scaler.get_scale() == 2.0**5
        runs.append(worker.outcome(model, optimizer))
    plain, scaled = runs
    assert (plain["selected"] == 0).any()
    assert plain.pop("skipped") == 0 and scaled.pop("skipped") == 3
    assert all(torch.equal(plain[key], scaled[key]) for key in plain)
