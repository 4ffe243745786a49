"""FSDP2, accelerate and distributed checkpoints: two gloo processes give the numbers of one."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parent))
import fsdp_worker as worker

from masm_ext import load_adapter
from masm_ext.integrations.fsdp import TrainingState

pytestmark = pytest.mark.long

#: Sums over two halves of a batch are rounded otherwise; 20 steps of AdamW carry that on.
ROUNDING = {"rtol": 1e-4, "atol": 5e-6}


class Runs:
    """The files of the processes, and the same training in this process alone."""

    def __init__(self, folder, seed):
        self.folder, self.seed = folder, seed
        self.model = worker.converted(seed)
        self.optimizer = worker.optimizer_of(self.model)
        worker.train(self.model, self.optimizer, seed, range(worker.STEPS))
        self.single = worker.outcome(self.model, self.optimizer)

    def ranks(self, name):
        """What both processes wrote."""
        return [torch.load(self.folder / f"{name}-{rank}.pt", weights_only=True) for rank in range(2)]


def start(scenarios, folder, rank, seed):
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path),
        # of accelerate
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "0",
    }  # fmt: skip
    command = [sys.executable, worker.__file__, scenarios, str(folder), str(rank), "2", str(seed)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def runs(request, tmp_path_factory):
    value = request.config.getoption("--seed")
    seed = int.from_bytes(os.urandom(2), "little") if value is None else value % 2**16
    print(f"processes with --seed {seed}")
    folder = tmp_path_factory.mktemp("fsdp")
    scenarios = "several,accumulated,bf16,replicas,checkpoint,gradients,refused"
    if importlib.util.find_spec("accelerate") is not None:
        scenarios += ",accelerated,accelerated_without_shard"
    if importlib.util.find_spec("transformers") is not None:
        scenarios += ",transformer"
    processes = [start(scenarios, folder, rank, seed) for rank in range(2)]
    runs = Runs(folder, seed)
    for process in processes:
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text[-3000:]
    return runs


def check_equal(runs, name, reference, **tolerance):
    first, second = runs.ranks(name)
    assert first.keys() == second.keys() == reference.keys()
    for key, value in reference.items():
        assert torch.equal(first[key], second[key]), f"{key} differs between the processes"
        if value.is_floating_point() and key != "selected":
            torch.testing.assert_close(first[key], value, **tolerance, msg=lambda m, key=key: f"{key}: {m}")
        else:
            assert torch.equal(first[key], value), key


@pytest.mark.parametrize("name", ["several", "accumulated", "replicas"])
def test_two_processes_give_the_numbers_of_one(runs, name):
    check_equal(runs, name, runs.single, **ROUNDING)
    assert (runs.single["selected"] == 0).any() and (runs.single["selected"] == 1).any()


def test_each_process_holds_half_of_the_frozen_weights(runs):
    whole = worker.frozen_bytes(runs.model) + sum(
        layer.principal.nbytes for layer in runs.optimizer.masks.layers.values()
    )
    for own in runs.ranks("bytes-several"):
        assert 0.49 * whole < own < 0.53 * whole  # 31 rows are 16 in each, the last one padded


def test_bfloat16_policy(runs):
    first, second = runs.ranks("bf16")
    learned = [name for name, p in runs.model.named_parameters() if p.requires_grad]
    assert all(torch.equal(first[name], second[name]) for name in learned)
    start = dict(worker.converted(runs.seed).named_parameters())
    moved, reference = (
        torch.cat([(values[name] - start[name].detach()).flatten() for name in learned])
        for values in (first, runs.single)
    )
    assert 0.95 < torch.cosine_similarity(moved, reference, dim=0) < 1 - 1e-6


@pytest.mark.parametrize("name", ["several", "bf16"])
def test_the_adapter_loads_on_the_plain_model(runs, name):
    model = worker.Net(runs.seed)
    load_adapter(model, runs.folder / f"adapter-{name}")
    learned = {n: p for n, p in model.named_parameters() if p.requires_grad}
    first, _ = runs.ranks(name)
    assert all(torch.equal(p, first[n]) for n, p in learned.items())
    with torch.no_grad():
        y = model(worker.batch(runs.seed, 0)[0])
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "several" else {"rtol": 0.02, "atol": 0.02}
    for output in runs.ranks(f"output-{name}"):
        torch.testing.assert_close(output, y, **tolerance)


def test_a_vision_transformer(runs):
    """Blocks as units, projections that run as one call, recomputed activations, norms that learn."""
    pytest.importorskip("transformers")
    single = worker.train_vit(*worker.vit(runs.seed), runs.seed)
    assert 0 < single["selected"].mean() < 1
    single.pop("history")  # holds quotients of small sums
    for name in ("vit", "vit-bf16"):
        first, second = runs.ranks(name)
        assert all(torch.equal(first[key], second[key]) for key in first), name
    first, _ = runs.ranks("vit")
    for key, value in single.items():
        torch.testing.assert_close(first[key], value, rtol=1e-3, atol=2e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_a_checkpoint_resumes_bit_for_bit(runs):
    for whole, resumed in zip(runs.ranks("whole"), runs.ranks("resumed")):
        assert whole.keys() == resumed.keys() and all(torch.equal(whole[k], resumed[k]) for k in whole)
    check_equal(runs, "whole", runs.single, **ROUNDING)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_of_two_processes_loads_in_one(runs):
    """Here without a process group and without sharding, on another model that has trained already."""
    model = worker.converted(runs.seed + 1)
    optimizer = worker.optimizer_of(model)
    worker.train(model, optimizer, runs.seed, range(3))
    dcp.load({"training": TrainingState(model, optimizer)}, checkpoint_id=runs.folder / "dcp", no_dist=True)
    half, _ = runs.ranks("half")
    now = worker.outcome(model, optimizer)
    assert now.keys() == half.keys()
    for key in half:
        if key in ("orthogonality", "spectral", "update"):  # computed from the state
            torch.testing.assert_close(now[key], half[key])
        else:
            assert torch.equal(now[key], half[key]), key
    frozen = worker.converted(runs.seed).state_dict()
    for key, value in model.state_dict().items():
        if key.endswith(("principal", "u0", "norm.weight", "stem.weight")):
            assert torch.equal(value, frozen[key]), key
    worker.train(model, optimizer, runs.seed, range(worker.STEPS // 2, worker.STEPS))
    for key, value in worker.outcome(model, optimizer).items():
        torch.testing.assert_close(value, runs.single[key], **ROUNDING)


def test_a_checkpoint_of_another_optimizer_is_refused(runs):
    model = worker.converted(runs.seed)
    state = TrainingState(model, worker.optimizer_of(model)).state_dict()
    head_only = worker.MaskedAdamW(model.head.parameters())
    with pytest.raises(ValueError, match=r"holds 26 parameters .* this optimizer 2"):
        TrainingState(model, head_only).load_state_dict(state)
    with pytest.raises(ValueError, match="26 parameters of the optimizer are not in the model"):
        TrainingState(worker.converted(runs.seed), worker.optimizer_of(model))


def test_gradients_are_averaged(runs):
    for found in runs.ranks("gradients"):
        assert found["both"].tolist() == [1.5] and found["none"] is None
        assert found["one"].tolist() == [0.0, 0.5, 1.0, 1.5]
        assert found["after"].tolist() == [1.5]


def test_without_shard_the_error_says_what_to_call(runs):
    parts = [
        *3 * ["masm_ext.integrations.fsdp.shard"],
        "sharded already",
        "masm_ext.integrations.fsdp.shard",
        "no MASMLinear",
        "ignored_params",
        "is on meta, the mesh on cpu",
        "divided among processes; save_adapter",
    ]
    for rank, messages in enumerate(runs.ranks("messages")):
        *messages, not_written = messages
        assert len(messages) == len(parts)
        for message, part in zip(messages, parts):
            assert part in message and message.startswith("ValueError"), message
        # only process 0 writes, and the others do not wait for ever
        assert not_written.startswith(["FileExistsError", "RuntimeError: process 0 failed: FileExistsError"][rank])


def test_accelerate(runs):
    pytest.importorskip("accelerate")
    check_equal(runs, "accelerated", runs.single, **ROUNDING)
    for rank in range(2):
        assert "masm_ext.integrations.fsdp.shard" in (runs.folder / f"refused-{rank}.txt").read_text()
